"""The link: one TCP connection per class of traffic, carrying what the core formats.

```
 client                                     server
 connecting ─ connected ─ handshake ─ active ─ lost ─ back-off ─ connecting
```

Guarantees: bytes go from the socket into one buffer per connection and from there into the core,
and from buffers of the core to the socket; while the socket takes no more, nothing is taken from
the core. A lost connection is made again for ever, with back-off. The handshake, heartbeats and
what a frame means are the core's.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dualrestore.config import Address, BackupAddress
from dualrestore.transport.acceptor import Acceptor
from dualrestore.transport.backoff import Backoff
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.sockets import listen_tcp, prepare_link_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualrestore.core import LinkConnection, LinkHub, PrimaryVolume

log = logging.getLogger("dualrestore.link")

LinkClass = Literal["demand", "mirror", "bulk"]
LINK_CLASSES: tuple[LinkClass, ...] = ("demand", "mirror", "bulk")

RECEIVE_BYTES = 256 * 1024
SEND_BYTES = 256 * 1024
"""What is taken from the core at a time, and the most that waits in a transport."""
CONNECT_SECONDS = 10.0
BACKOFF_FIRST, BACKOFF_MOST = 0.1, 5.0
REFUSED_SECONDS = 10.0
"""A peer that is the wrong one is asked again no sooner than this."""
LASTING_SECONDS = 1.0
"""A session that ended sooner was none: what ended it would end the next one as soon."""
CONNECTIONS_MAX = 300


class LinkProtocol(asyncio.BufferedProtocol):
    """One TCP connection between a socket and a `LinkConnection`."""

    connection: "LinkConnection"
    """Made once bytes can flow: after the handshake of TLS, so that a failed one costs nothing."""
    _buffer: bytearray
    _view: memoryview

    def __init__(
        self,
        room: "LinkTransport",
        begin: "Callable[[], LinkConnection]",
        *,
        is_accepted: bool = False,
        on_active: "Callable[[], None] | None" = None,
    ) -> None:
        self.is_accepted = is_accepted
        self._on_active = on_active
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.was_active = False
        self.error: str | None = None
        """What the core had against the connection when it ended."""
        self._begin = begin
        self._room = room
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=SEND_BYTES)
        raw = transport.get_extra_info("socket")
        if raw is not None:
            prepare_link_socket(raw)
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self.connection = self._begin()
        self._room.add(self)
        self._tick()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's name
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        self._room.bytes_received += nbytes
        self.connection.receive(self._buffer, nbytes)
        self.pump()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self.pump()

    def pump(self) -> None:
        """Moves what the core has to say into the socket, as long as that takes it."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if not self.was_active and self.connection.state == "active":
            self.was_active = True
            if self._on_active is not None:
                self._on_active()
        while not self._paused:
            outgoing = self.connection.take_outgoing(SEND_BYTES)
            if outgoing is None:
                break
            self._room.bytes_sent += len(outgoing)
            transport.write(memoryview(outgoing))
        if self.connection.state in {"closed", "failed"}:
            transport.close()

    def _tick(self) -> None:
        # The core owns heartbeats and silence; we only lend it a clock.
        seconds = self.connection.tick()
        self.pump()
        if self._transport is not None and not self._transport.is_closing():
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(max(seconds, 0.001), self._tick)
        elif self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._room.remove(self)
        # A transport that ended while bytes were waiting must not be aborted any more: it fails.
        self._transport = None
        # Told that its socket is gone, the core has only that to say.
        self.error = self.connection.error
        self.connection.close()
        if not self.lost.done():
            self.lost.set_result(exc)

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()


@dataclass
class ClientLine:
    """One (volume, backup, class) that is kept connected."""

    volume: "PrimaryVolume"
    backup: int
    where: BackupAddress
    link_class: LinkClass
    error: str | None = None
    protocol: LinkProtocol | None = field(default=None, repr=False)
    active: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set while its session is open; demand and bulk follow the mirror line into its session."""
    hurry: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Something has changed that makes it worth trying again at once."""


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (problem := task.exception()) is not None:
        log.error("a line of the link is no longer kept", exc_info=problem)


def describe_failure(problem: BaseException, where: Address) -> str:
    """Words for the operator."""
    if isinstance(problem, ssl.SSLCertVerificationError):
        return f"{where}: the backup's certificate was not accepted: {problem.verify_message}"
    if isinstance(problem, ssl.SSLError):
        return f"{where}: TLS failed ({problem.reason}); do both sides have tls set?"
    if isinstance(problem, TimeoutError):
        return f"{where}: no answer within {CONNECT_SECONDS:.0f} s"
    if isinstance(problem, OSError):
        return f"{where}: {os.strerror(problem.errno) if problem.errno else problem}"
    return f"{where}: {problem}"


class LinkTransport:
    """All link connections of a process. Its methods are called from any thread."""

    def __init__(
        self,
        hub: "LinkHub",
        thread: LoopThread,
        *,
        client_tls: ssl.SSLContext | None = None,
        server_tls: ssl.SSLContext | None = None,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.lines: list[ClientLine] = []
        self._hub = hub
        self._thread = thread
        self._client_tls = client_tls
        self._server_tls = server_tls
        self._protocols: dict[int, LinkProtocol] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._acceptor: Acceptor | None = None

    def start(self) -> None:
        """Begins to listen to the hub."""

        async def watch() -> None:
            asyncio.get_running_loop().add_reader(self._hub.wake_descriptor, self._wake)

        self._thread.call(watch())

    def _wake(self) -> None:
        for identity in self._hub.ready():
            protocol = self._protocols.get(identity)
            if protocol is not None:
                protocol.pump()

    def add(self, protocol: LinkProtocol) -> None:
        """A protocol has its socket."""
        self._protocols[protocol.connection.id] = protocol

    def remove(self, protocol: LinkProtocol) -> None:
        """A protocol lost its socket."""
        self._protocols.pop(protocol.connection.id, None)
        connection = protocol.connection
        if protocol.is_accepted and connection.error:
            log.warning("link %s: %s", connection.label, connection.error)

    def listen(self, address: Address) -> None:
        """Takes links for the volumes that the hub serves."""
        listener = listen_tcp(address)

        async def serve() -> None:
            self._acceptor = Acceptor(listener, self._welcome)

        self._thread.call(serve())

    async def _welcome(self, client: socket.socket) -> None:
        if len(self._protocols) >= CONNECTIONS_MAX:
            client.close()
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: LinkProtocol(self, self._hub.accept, is_accepted=True),
                client,
                ssl=self._server_tls,
                ssl_handshake_timeout=CONNECT_SECONDS if self._server_tls else None,
            )
        except (OSError, TimeoutError) as problem:
            log.info("a link was not accepted: no TLS: %s", problem)

    def connect(self, volume: "PrimaryVolume", backup: int, where: BackupAddress) -> None:
        """Keeps the volume connected to one of its backups."""

        async def begin() -> None:
            lines = {
                link_class: ClientLine(volume, backup, where, link_class)
                for link_class in LINK_CLASSES
            }
            self.lines.extend(lines.values())
            for line in lines.values():
                keeping = self._keep(line, lines["mirror"])
                task = asyncio.get_running_loop().create_task(keeping)
                task.add_done_callback(_report)
                self._tasks.append(task)

        self._thread.call(begin())

    def hurry(self, volume: "PrimaryVolume") -> None:
        """Lines of the volume that wait to be tried again are tried now."""

        async def wake() -> None:
            for line in self.lines:
                if line.volume is volume:
                    line.hurry.set()

        self._thread.call(wake())

    async def _keep(self, line: ClientLine, mirror: ClientLine) -> None:
        backoff = Backoff(BACKOFF_FIRST, BACKOFF_MOST)
        while True:
            if line is not mirror:
                await mirror.active.wait()
            lasted, refused = await self._connect_once(line)
            if lasted:
                backoff.reset()
            delay = backoff.delay()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(delay, REFUSED_SECONDS) if refused else delay):
                    await line.hurry.wait()
            line.hurry.clear()

    async def _connect_once(self, line: ClientLine) -> tuple[bool, bool]:
        """Whether its session lasted, and whether trying again soon is useless."""
        address = line.where.address
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, protocol = await loop.create_connection(
                    lambda: LinkProtocol(
                        self,
                        lambda: self._hub.connect(
                            line.volume, line.backup, line.where.name, line.link_class
                        ),
                        on_active=line.active.set,
                    ),
                    address.host,
                    address.port,
                    ssl=self._client_tls,
                )
        except (OSError, TimeoutError) as problem:
            self._note(line, describe_failure(problem, address))
            return False, False
        line.protocol = protocol
        began = loop.time()
        try:
            reason = await protocol.lost
        finally:
            line.protocol = None
            line.active.clear()
            protocol.abort()
        lasted = protocol.was_active and loop.time() - began >= LASTING_SECONDS
        if lasted:
            line.error = None
        self._note(line, protocol.error or self._describe_end(protocol, reason, address))
        return lasted, protocol.connection.refused

    def _note(self, line: ClientLine, error: str) -> None:
        # The same failure comes back with every attempt: once in the log is enough.
        if error != line.error:
            log.warning("link to %s (%s): %s", line.where, line.link_class, error)
        line.error = error

    def _describe_end(
        self, protocol: LinkProtocol, reason: Exception | None, where: Address
    ) -> str:
        if protocol.was_active:
            return describe_failure(reason, where) if reason else f"{where}: connection closed"
        # In TLS 1.3 a client whose certificate is refused learns of it after its handshake.
        hint = (
            "does it accept our certificate (client-cert.pem)?"
            if self._client_tls
            else "does it demand TLS (tls in [node])?"
        )
        words = f" ({reason.reason})" if isinstance(reason, ssl.SSLError) else ""
        return f"{where}: the backup closed the connection before it answered{words}; {hint}"

    def line_errors(self, volume: "PrimaryVolume", backup: int) -> list[str]:
        """What keeps the lines of a volume to one backup from being active, if anything. That of
        the mirror line comes first: the others only follow it."""
        lines = sorted(self.lines, key=lambda line: line.link_class != "mirror")
        return [
            line.error
            for line in lines
            if line.volume is volume
            and line.backup == backup
            and line.error is not None
            and not line.active.is_set()
        ]

    def stop(self) -> None:
        """Closes everything. The hub and volumes stay open."""

        async def end() -> None:
            loop = asyncio.get_running_loop()
            if self._acceptor is not None:
                await self._acceptor.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for protocol in list(self._protocols.values()):
                protocol.pump()
                protocol.abort()
            await asyncio.sleep(0)
            loop.remove_reader(self._hub.wake_descriptor)

        with contextlib.suppress(RuntimeError):
            self._thread.call(end())
