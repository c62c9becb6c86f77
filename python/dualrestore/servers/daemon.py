"""The daemon's process: opens the node, serves the control socket, ends cleanly on a signal.

| event | then |
|---|---|
| started | node open, then control socket (so that whoever can connect finds it all there) |
| both open | becomes the configured user (`confinement`), then systemd is told |
| SIGTERM, SIGINT | no new requests, jobs cancelled, node closed, sockets removed, exit 0 |
| a second signal | exits at once; volumes recover as after a crash |

Guarantees: a full disk or a vanished peer is an error, not the end of the process (SIGXFSZ and
SIGPIPE are ignored). Does not know: what the verbs do.
"""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Iterator

import uvicorn

from dualrestore.config import Configuration
from dualrestore.errors import ExitCode
from dualrestore.servers.alarms import LOOK_SECONDS, Watch
from dualrestore.servers.confinement import become_user, confine
from dualrestore.servers.control import Control
from dualrestore.servers.ledger import Ledger
from dualrestore.servers.node import Node
from dualrestore.servers.notify import notify
from dualrestore.transport.handing import Reception, handing_path
from dualrestore.transport.sockets import OwnerSocket, listen_unix, remove_socket

log = logging.getLogger("dualrestore")

JOBS_SECONDS = 10.0
GRACE_SECONDS = 3


class _Server(uvicorn.Server):
    """uvicorn, leaving signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _ignore_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


async def _serve(configuration: Configuration) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("%s again: leaving at once", number.name)
            os._exit(ExitCode.TERMINATED)
        log.info("%s: stopping", number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    node = Node(configuration)
    await asyncio.to_thread(node.open)
    watching = asyncio.create_task(_watch(node, stop))
    try:
        await _control(configuration, node, stop)
    finally:
        stop.set()
        await watching
        await asyncio.to_thread(node.close)
    log.info("stopped cleanly")


async def _watch(node: Node, stop: asyncio.Event) -> None:
    watch = Watch(node.backups)
    while not stop.is_set():
        await asyncio.to_thread(watch.look)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                await stop.wait()


async def _control(configuration: Configuration, node: Node, stop: asyncio.Event) -> None:
    ledger = Ledger()
    path = configuration.node.control
    reception = Reception(handing_path(path))
    control = Control(node, ledger, reception)
    listener = listen_unix(path, 0o600, OwnerSocket)
    try:
        reception.open()
        become_user(configuration)
        server = _Server(
            uvicorn.Config(
                control.application(),
                http="h11",
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        count = len(configuration.volumes)
        notify(READY="1", STATUS=f"serving {count} volumes")
        log.info("serving %d volumes; control socket %s", count, path)
        await asyncio.wait(
            [serving, asyncio.create_task(stop.wait())], return_when=asyncio.FIRST_COMPLETED
        )
        notify(STOPPING="1", STATUS="stopping")
        control.stopping.set()
        await asyncio.to_thread(ledger.stop, JOBS_SECONDS)
        server.should_exit = True
        await serving
    finally:
        reception.close()
        listener.close()
        remove_socket(path)


def serve(configuration: Configuration) -> None:
    """Runs until a signal ends it."""
    _ignore_signals()
    confine(configuration)
    asyncio.run(_serve(configuration))
