"""The cable between two daemons: a TCP relay that can be cut, pulled silently, and mended.

| state | new connections | connections there are |
|---|---|---|
| whole | relayed | relayed |
| `cut` | refused | reset |
| `freeze` | accepted, nothing goes through | nothing goes through, nothing is said |

Does not know: what it carries.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading

PIECE_BYTES = 64 * 1024
TICK_SECONDS = 0.05


class _Pipe:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.held = b""


class Cable:
    """Relays from its own port of the loopback to another."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._state = "whole"
        self._changed = threading.Condition()
        self._seen = ""
        self._ending = False
        self._pipes: list[_Pipe] = []
        self._thread = threading.Thread(target=self._run, name="cable", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it."""
        self._ending = True
        self._thread.join()

    def _put(self, state: str) -> None:
        with self._changed:
            self._state = state
            assert self._changed.wait_for(lambda: self._seen == state, 10), "the cable is stuck"

    def cut(self) -> None:
        """Resets every connection and refuses new ones, until it is mended."""
        self._put("cut")

    def freeze(self) -> None:
        """Nothing goes through and nobody is told, until it is mended."""
        self._put("frozen")

    def mend(self) -> None:
        """Whole again."""
        self._put("whole")

    def _run(self) -> None:
        try:
            while not self._ending:
                with self._changed:
                    state = self._state
                if state == "cut":
                    self._reset()
                with self._changed:
                    self._seen = state
                    self._changed.notify_all()
                self._turn(state)
        finally:
            self._reset()
            self._listener.close()

    def _turn(self, state: str) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            if state == "whole":
                for pipe in self._pipes:
                    self._watch(selector, pipe)
            for key, _ in selector.select(TICK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept(state)
                    return
                for pipe in key.data:
                    if not self._move(pipe):
                        self._drop(pipe)
                        return

    @staticmethod
    def _watch(selector: selectors.BaseSelector, pipe: _Pipe) -> None:
        # A socket is the source of one pipe and the target of the other.
        side, event = (
            (pipe.target, selectors.EVENT_WRITE)
            if pipe.held
            else (pipe.source, selectors.EVENT_READ)
        )
        try:
            key = selector.get_key(side)
        except KeyError:
            selector.register(side, event, [pipe])
        else:
            selector.modify(side, key.events | event, [*key.data, pipe])

    def _accept(self, state: str) -> None:
        client, _ = self._listener.accept()
        if state == "cut":
            _reset(client)
            return
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port), 10)
        except OSError:
            _reset(client)
            return
        for side in (client, server):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipes += [_Pipe(client, server), _Pipe(server, client)]

    @staticmethod
    def _move(pipe: _Pipe) -> bool:
        try:
            if not pipe.held:
                pipe.held = pipe.source.recv(PIECE_BYTES)
                if not pipe.held:
                    return False
            pipe.held = pipe.held[pipe.target.send(pipe.held) :]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def _drop(self, ended: _Pipe) -> None:
        for side in (ended.source, ended.target):
            with contextlib.suppress(OSError):
                side.close()
        self._pipes = [pipe for pipe in self._pipes if pipe.source.fileno() >= 0]

    def _reset(self) -> None:
        for pipe in self._pipes:
            _reset(pipe.source)
        self._pipes = []


def _reset(side: socket.socket) -> None:
    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    side.close()
