"""NBD front doors: listeners whose connections are given to the core as descriptors.

Guarantees: not one byte of a client passes through Python, TLS included. A name that leads to
several addresses is listened at on all of them. Does not know: exports, volumes, who may use what.
"""

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING

from dualrestore.config import Export, UnixExport
from dualrestore.errors import BusyError
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.sockets import listen_tcp_everywhere, listen_unix, remove_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualrestore.core import NbdServer

log = logging.getLogger("dualrestore.nbd")

UNPREPARED_MAX = 100
"""Connections that wait for `prepare`."""


class NbdDoor:
    """One address. Its methods are called from any thread."""

    def __init__(
        self,
        thread: LoopThread,
        server: "NbdServer",
        export: Export,
        prepare: "Callable[[], None] | None" = None,
    ) -> None:
        """`prepare` is called in a thread before each connection is given away."""
        self.export = export
        self.server = server
        self._thread = thread
        self._prepare = prepare
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begins to accept."""
        if isinstance(self.export, UnixExport):
            listeners = [listen_unix(self.export.path, 0o660)]
        else:
            listeners = listen_tcp_everywhere(self.export.address)
        for listener in listeners:
            listener.setblocking(False)
        self._listeners = listeners

        async def begin() -> None:
            for listener in listeners:
                asyncio.get_running_loop().add_reader(listener, self._accept, listener)

        self._thread.call(begin())

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, place = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as problem:
            # Out of descriptors, most likely: without a pause this would spin.
            log.warning("%s: cannot accept: %s", self.export, problem.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(0.5, self._resume, listener)
            return
        peer = f"{place[0]}:{place[1]}" if isinstance(place, tuple) else str(self.export)
        if self._prepare is None:
            self._give(client, peer)
        elif len(self._tasks) >= UNPREPARED_MAX:
            client.close()
        else:
            task = asyncio.get_running_loop().create_task(self._welcome(client, peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(_report)

    async def _welcome(self, client: socket.socket, peer: str) -> None:
        assert self._prepare is not None
        await asyncio.to_thread(self._prepare)
        self._give(client, peer)

    def _resume(self, listener: socket.socket) -> None:
        if listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _give(self, client: socket.socket, peer: str) -> None:
        client.setblocking(True)
        try:
            self.server.serve(client.detach(), peer)
        except BusyError as problem:
            log.warning("%s: %s refused: %s", self.export, peer, problem)

    def close(self) -> None:
        """Accepts no more; sessions go on until the server is shut down."""
        listeners, self._listeners = self._listeners, []
        if not listeners:
            return

        async def end() -> None:
            for listener in listeners:
                asyncio.get_running_loop().remove_reader(listener)
                listener.close()

        with contextlib.suppress(RuntimeError):
            self._thread.call(end())
        if isinstance(self.export, UnixExport):
            remove_socket(self.export.path)


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (problem := task.exception()) is not None:
        log.error("an NBD connection was not served", exc_info=problem)
