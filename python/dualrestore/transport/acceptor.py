"""Accepts at a TCP address, and bounds what has not yet shown who it is.

| event | then |
|---|---|
| a client connects | it is welcomed, in a task of its own |
| one more than `WAITING_MAX` are being welcomed | the one that waits longest is dropped |
| no descriptor is left | nothing is accepted for a moment |

Guarantees: memory for clients that do not finish their handshake is bounded, and they cannot keep
out one that does: it is done before so many others have come.
Does not know: TLS, what a client wants.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

log = logging.getLogger("dualrestore")

WAITING_MAX = 100
PAUSE_SECONDS = 0.5

Welcome = Callable[[socket.socket], Awaitable[None]]


class Acceptor:
    """One listener. Used in the thread of the event loop only."""

    def __init__(self, listener: socket.socket, welcome: Welcome) -> None:
        """`welcome` owns the socket that it is given, and closes it when it is cancelled."""
        listener.setblocking(False)
        self._listener = listener
        self._welcome = welcome
        self._waiting: dict[asyncio.Task[None], None] = {}
        asyncio.get_running_loop().add_reader(listener, self._accept)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as problem:
            # Out of descriptors, most likely: without a pause this would spin.
            log.warning("%s: cannot accept: %s", self._listener.getsockname(), problem.strerror)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(PAUSE_SECONDS, self._resume)
            return
        if len(self._waiting) >= WAITING_MAX:
            # Forgotten at once: it needs some turns of the loop to end, and others come meanwhile.
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        client.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._receive(client))
        self._waiting[task] = None
        task.add_done_callback(self._forget)

    async def _receive(self, client: socket.socket) -> None:
        await self._welcome(client)

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._waiting.pop(task, None)
        if not task.cancelled() and (problem := task.exception()) is not None:
            log.error("a client could not be welcomed", exc_info=problem)

    def _resume(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """Accepts no more, and drops who is being welcomed."""
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        # Whoever has just come has a task that has not begun, and would be left open.
        await asyncio.sleep(0)
        waiting = list(self._waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
