"""A thin link in user space: a TCP relay with a rate and a delay in each direction.

Guarantees: bytes keep their order within a connection; all connections of one direction share its
rate, in turn, a small piece each; every byte takes at least `delay`. Measured like a wire: rate
counts payload. Needs no privileges. Does not know: what it carries.
"""

import asyncio
import contextlib
import socket
import statistics
import time
from collections.abc import Coroutine
from typing import Any

from dualrestore.config import Address
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.sockets import listen_tcp

PIECE_BYTES = 16 * 1024
"""What one connection sends before another of the same direction gets its turn."""
OPEN_PIECE_BYTES = 256 * 1024
PIECES_MAX = 1024
"""Pieces under way in one connection and direction."""
SOCKET_BYTES = 256 * 1024
"""Buffers of the relay's sockets: deep ones would hide the thin link from its users."""
TIMER_SECONDS = 0.004
"""What a sleep may take too long: that much of the wire's time may be used afterwards."""
CONNECT_SECONDS = 10.0
PINGS = 21


class Direction:
    """One way of the link: its rate as a clock that says when the wire is free again."""

    def __init__(self) -> None:
        self.rate: float | None = None
        self.delay = 0.0
        self.bytes_carried = 0
        self._free_at = 0.0

    def reserve(self, count: int, now: float) -> float:
        """Takes the wire for `count` bytes; returns when the last of them has left."""
        self.bytes_carried += count
        if self.rate is None:
            return now
        self._free_at = max(self._free_at, now - TIMER_SECONDS) + count / self.rate
        return self._free_at


class ShapedLink:
    """A listener on loopback that relays to `target`. Methods are called from any thread."""

    def __init__(self, thread: LoopThread, target: Address) -> None:
        self.forward = Direction()
        self.backward = Direction()
        self._target = target
        self._thread = thread
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def bytes_carried(self) -> int:
        """Both ways together."""
        return self.forward.bytes_carried + self.backward.bytes_carried

    def open(self, address: Address) -> None:
        """Begins to accept."""
        listener = listen_tcp(address)
        listener.setblocking(False)
        self._listener = listener

        async def begin() -> None:
            self._start(self._accept(listener))

        self._thread.call(begin())

    def shape(self, rate: float | None, delay: float) -> None:
        """Bytes a second (None: as fast as it goes) and seconds, each way."""
        for direction in (self.forward, self.backward):
            direction.rate, direction.delay = rate, delay

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(_quiet(coroutine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            self._start(self._carry(client))

    async def _carry(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with client:
            server = socket.socket(socket.AF_INET6 if ":" in self._target.host else socket.AF_INET)
            with server:
                for end in (client, server):
                    end.setblocking(False)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
                async with asyncio.timeout(CONNECT_SECONDS):
                    await loop.sock_connect(server, tuple(self._target))
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pipe(client, server, self.forward))
                    both.create_task(self._pipe(server, client, self.backward))

    async def _pipe(
        self, source: socket.socket, target: socket.socket, direction: Direction
    ) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_MAX)
        deliverer = asyncio.create_task(_deliver(under_way, target))
        loop = asyncio.get_running_loop()
        try:
            while not deliverer.done():
                size = OPEN_PIECE_BYTES if direction.rate is None else PIECE_BYTES
                piece = await loop.sock_recv(source, size)
                if not piece:
                    break
                now = loop.time()
                left = direction.reserve(len(piece), now)
                await under_way.put((max(left, now) + direction.delay, piece))
                if left > now:
                    await asyncio.sleep(left - now)
            await under_way.put((0.0, b""))
            await deliverer
        finally:
            deliverer.cancel()

    def close(self) -> None:
        """Ends every connection."""

        async def end() -> None:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._listener is not None:
                self._listener.close()

        self._thread.call(end())


async def _deliver(under_way: "asyncio.Queue[tuple[float, bytes]]", target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        arrives, piece = await under_way.get()
        wait = arrives - loop.time()
        if wait > 0:
            await asyncio.sleep(wait)
        if not piece:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)
            return
        await loop.sock_sendall(target, piece)


async def _quiet(coroutine: Coroutine[Any, Any, None]) -> None:
    # A connection that one end resets is what links do; the other end learns by our closing.
    with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError, ExceptionGroup):
        await coroutine


def measure_round_trip(rate: float | None, delay: float) -> float:
    """Median seconds of one byte there and back over an idle link of this shape.

    More than twice the delay: timers and the relay itself cost a little, and whoever compares
    something with the link compares it with this.
    """
    thread = LoopThread("dualrestore-ping")
    with listen_tcp(Address("127.0.0.1", 0)) as far, listen_tcp(Address("127.0.0.1", 0)) as probe:
        near = Address("127.0.0.1", probe.getsockname()[1])
        probe.close()
        link = ShapedLink(thread, Address("127.0.0.1", far.getsockname()[1]))
        link.open(near)
        link.shape(rate, delay)
        try:
            with socket.create_connection((near.host, near.port), CONNECT_SECONDS) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server, _ = far.accept()
                with server:
                    return statistics.median(_ping(client, server) for _ in range(PINGS))
        finally:
            link.close()
            thread.stop()


def _ping(client: socket.socket, server: socket.socket) -> float:
    began = time.monotonic()
    client.sendall(b".")
    server.sendall(server.recv(1))
    client.recv(1)
    return time.monotonic() - began
