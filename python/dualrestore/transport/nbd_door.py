"""NBD front doors: listeners whose connections are given to the core as descriptors.

Guarantees: on a Unix socket or loopback without TLS, not one byte of a client passes through
Python. With TLS it is ended here and relayed through a socket pair, with back-pressure both ways;
then nothing is served before TLS (see `nbd_plain`). Does not know: exports, volumes.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from typing import TYPE_CHECKING

from dualrestore.config import Export, UnixExport
from dualrestore.errors import BusyError
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_plain import GREETING, PlainNegotiation
from dualrestore.transport.sockets import listen_tcp, listen_unix, remove_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from dualrestore.core import NbdServer

log = logging.getLogger("dualrestore.nbd")

HANDSHAKE_SECONDS = 10.0
RELAY_BYTES = 256 * 1024
SLOW_CONNECTIONS_MAX = 100
"""Connections that Python still has to do with: behind TLS, or not yet given away."""


class NbdDoor:
    """One address. Its methods are called from any thread."""

    def __init__(
        self,
        thread: LoopThread,
        server: "NbdServer",
        export: Export,
        tls: ssl.SSLContext | None,
        prepare: "Callable[[], None] | None" = None,
    ) -> None:
        """`prepare` is called in a thread before each connection is given away."""
        self.export = export
        self.server = server
        self._thread = thread
        self._tls = tls if not isinstance(export, UnixExport) else None
        self._prepare = prepare
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Begins to accept."""
        if isinstance(self.export, UnixExport):
            listener = listen_unix(self.export.path, 0o660)
        else:
            listener = listen_tcp(self.export.address)
        listener.setblocking(False)
        self._listener = listener

        async def begin() -> None:
            asyncio.get_running_loop().add_reader(listener, self._accept)

        self._thread.call(begin())

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, place = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as problem:
            # Out of descriptors, most likely: without a pause this would spin.
            log.warning("%s: cannot accept: %s", self.export, problem.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(0.5, self._resume)
            return
        peer = f"{place[0]}:{place[1]}" if isinstance(place, tuple) else str(self.export)
        if client.family != socket.AF_UNIX:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._tls is None and self._prepare is None:
            self._give(client, peer)
        elif len(self._tasks) >= SLOW_CONNECTIONS_MAX:
            client.close()
        else:
            task = asyncio.get_running_loop().create_task(self._welcome(client, peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(_report)

    async def _welcome(self, client: socket.socket, peer: str) -> None:
        if self._prepare is not None:
            await asyncio.to_thread(self._prepare)
        if self._tls is None:
            self._give(client, peer)
        else:
            await self._negotiate(client, peer)

    def _resume(self) -> None:
        if self._listener is not None and self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _give(self, client: socket.socket, peer: str) -> None:
        client.setblocking(True)
        try:
            self.server.serve(client.detach(), peer)
        except BusyError as problem:
            log.warning("%s: %s refused: %s", self.export, peer, problem)

    async def _negotiate(self, client: socket.socket, peer: str) -> None:
        assert self._tls is not None
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        transport, plain = await loop.connect_accepted_socket(_PlainSide, client)
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if not await plain.wants_tls:
                    return
                outside = _Half()
                encrypted = await loop.start_tls(transport, outside, self._tls, server_side=True)
            if encrypted is None:
                return
            await self._relay(encrypted, outside, plain.negotiation.client_flags, peer)
        except (OSError, TimeoutError) as problem:
            log.info("%s: %s: no TLS: %s", self.export, peer, problem)
        finally:
            transport.abort()

    async def _relay(
        self, encrypted: asyncio.Transport, outside: "_Half", flags: bytes, peer: str
    ) -> None:
        ours, theirs = socket.socketpair()
        # The core greets as if the client had just come; the client had that greeting from us.
        inside = _Half(swallow=len(GREETING))
        ours.setblocking(False)
        plain, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: inside, ours)
        outside.join(encrypted, plain)
        inside.join(plain, encrypted)
        plain.write(flags)
        self._give(theirs, f"{peer} over TLS")
        outside.start()
        inside.start()
        await asyncio.wait([outside.ended, inside.ended], return_when=asyncio.FIRST_COMPLETED)
        # What one side said last still reaches the other: close, not abort.
        encrypted.close()
        plain.close()
        await asyncio.wait([outside.ended, inside.ended], timeout=HANDSHAKE_SECONDS)

    def close(self) -> None:
        """Accepts no more; sessions go on until the server is shut down."""
        listener = self._listener
        if listener is None:
            return
        self._listener = None

        async def end() -> None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()

        with contextlib.suppress(RuntimeError):
            self._thread.call(end())
        if isinstance(self.export, UnixExport):
            remove_socket(self.export.path)


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (problem := task.exception()) is not None:
        log.error("NBD relay ended", exc_info=problem)


class _PlainSide(asyncio.Protocol):
    """The client before TLS."""

    def __init__(self) -> None:
        self.negotiation = PlainNegotiation()
        self.wants_tls: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(GREETING)

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        if self.wants_tls.done():
            self._transport.abort()
            return
        self._transport.write(self.negotiation.receive(data))
        if self.negotiation.state == "tls":
            # The client's next bytes are TLS and belong to the protocol that follows.
            self._transport.pause_reading()
            self.wants_tls.set_result(True)
        elif self.negotiation.state == "closed":
            self.wants_tls.set_result(False)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        if not self.wants_tls.done():
            self.wants_tls.set_result(False)


class _Half(asyncio.Protocol):
    """One side of a relay: what comes here goes to the other, as fast as that takes it."""

    def __init__(self, swallow: int = 0) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._swallow = swallow
        self._mine: asyncio.Transport | None = None
        self._other: asyncio.Transport | None = None
        self._held = bytearray()
        self._started = False

    def join(self, mine: asyncio.Transport, other: asyncio.Transport) -> None:
        """Names both transports."""
        self._mine, self._other = mine, other
        mine.set_write_buffer_limits(high=RELAY_BYTES)

    def start(self) -> None:
        """From now on bytes may pass."""
        self._started = True
        self._pass(b"")

    def data_received(self, data: bytes) -> None:
        if self._swallow:
            taken = min(self._swallow, len(data))
            self._swallow -= taken
            data = data[taken:]
        self._pass(data)

    def _pass(self, data: bytes) -> None:
        if not self._started or self._other is None:
            self._held += data
            return
        if self._held:
            data = bytes(self._held) + data
            self._held.clear()
        if data:
            self._other.write(data)

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other.is_closing():
            self._other.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's name
        if not self.ended.done():
            self.ended.set_result(None)
