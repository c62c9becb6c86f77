"""Standard input handed to a daemon: the descriptor itself, over a Unix socket beside its control
socket (`CONTROL.in`). No byte of the stream passes through the command line.

| who | says | |
|---|---|---|
| client | a token of 16 bytes | and with it one descriptor (SCM_RIGHTS) |
| daemon | `+` | it has it; a job may ask for it by its token, once |
| daemon | u32 length, `key.age` of the stream | once it has come, if the bundle is encrypted |
| client | `+` or `-`, u32 length, text | the line that `key.age` wraps, or why there is none |

Guarantees: what nobody asked for is closed when its client goes; identities and passphrases stay
with the client; every length is checked before it is used. Whoever can open the socket may do this:
its mode is that of the control socket. Does not know: bundles, jobs.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from dualrestore.errors import BusyError, LinkError, LockedError, UsageError
from dualrestore.keys import WRAPPED_BYTES_MAX
from dualrestore.transport.sockets import OwnerSocket, listen_unix, remove_socket

log = logging.getLogger("dualrestore")

SUFFIX = ".in"
TOKEN_BYTES = 16
TEXT_BYTES_MAX = 4096
HANDED_MAX = 64
"""Streams that wait to be asked for."""
PATIENCE_SECONDS = 10.0
"""For the daemon to take a descriptor."""
UNLOCK_SECONDS = 300.0
"""For the client to open a key: somebody may have to confirm it."""

_LENGTH = struct.Struct(">I")


def handing_path(control: Path) -> Path:
    """The socket beside a control socket."""
    return control.with_name(control.name + SUFFIX)


def _receive(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise ConnectionError("the other side went away")
        received += piece
    return bytes(received)


def _receive_text(connection: socket.socket, most: int) -> bytes:
    (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size))
    if length > most:
        raise ConnectionError(f"expected at most {most} bytes, found {length}")
    return _receive(connection, length)


class HandedStream:
    """A descriptor that a client handed over, on the daemon's side."""

    def __init__(self, connection: socket.socket, descriptor: int) -> None:
        self.descriptor = descriptor
        self.connection = connection

    def unlock(self, wrapped: bytes) -> bytes:
        """What the client says that `key.age` wraps. Raises `LockedError` with its reason."""
        try:
            self.connection.settimeout(UNLOCK_SECONDS)
            self.connection.sendall(_LENGTH.pack(len(wrapped)) + wrapped)
            verdict = _receive(self.connection, 1)
            text = _receive_text(self.connection, TEXT_BYTES_MAX)
        except OSError as problem:
            raise LinkError(f"whoever handed the stream over gives no key: {problem}") from problem
        if verdict != b"+":
            raise LockedError(text.decode("utf-8", "replace"))
        return text

    def close(self) -> None:
        """Lets go of the stream. May be called twice."""
        self.connection.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Reception:
    """Where a daemon takes descriptors. Everything but `HandedStream` runs on its event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._handed: dict[bytes, HandedStream] = {}

    def open(self) -> None:
        """Begins to accept, on the running loop."""
        self._listener = listen_unix(self._path, 0o600, OwnerSocket)
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except ConnectionAbortedError:
            return
        except OSError as problem:
            log.warning("%s: cannot accept: %s", self._path, problem.strerror)
            return
        if len(self._connections) >= HANDED_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        asyncio.get_running_loop().add_reader(connection, self._hear, connection)

    def _hear(self, connection: socket.socket) -> None:
        """The first word of a client; a second one, or its end, before anybody asked: dropped."""
        known = [token for token, held in self._handed.items() if held.connection is connection]
        if known:
            self._forget(connection)
            self._handed.pop(known[0]).close()
            return
        descriptors: list[int] = []
        try:
            token, descriptors, _, _ = socket.recv_fds(connection, TOKEN_BYTES, 4)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            if len(token) == TOKEN_BYTES and len(descriptors) == 1 and token not in self._handed:
                connection.sendall(b"+")
                self._handed[token] = HandedStream(connection, descriptors.pop())
                return
        except OSError as problem:
            log.info("%s: %s", self._path, problem)
        for descriptor in descriptors:
            os.close(descriptor)
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection)
        self._connections.discard(connection)

    def claim(self, token: str) -> HandedStream:
        """What was handed over with this token (hexadecimal), now the caller's to close."""
        try:
            handed = self._handed.pop(bytes.fromhex(token))
        except (ValueError, KeyError):
            raise UsageError(
                "expected a stream that was handed over, found none with this token: ask again"
            ) from None
        self._forget(handed.connection)
        return handed

    def close(self) -> None:
        """Accepts no more, and lets go of what nobody asked for."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()
        remove_socket(self._path)
        for connection in list(self._connections):
            self._forget(connection)
            connection.close()
        for handed in self._handed.values():
            handed.close()
        self._handed.clear()


class Handing:
    """Hands a descriptor to the daemon, and answers its question. A context manager: the daemon has
    the stream until it is left. `unwrap` opens a `key.age`.
    """

    def __init__(
        self, control: Path, descriptor: int, unwrap: Callable[[bytes], bytes] | None
    ) -> None:
        self.token = secrets.token_hex(TOKEN_BYTES)
        self._path = handing_path(control)
        self._descriptor = descriptor
        self._unwrap = unwrap
        self._connection = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        try:
            self._connection.settimeout(PATIENCE_SECONDS)
            self._connection.connect(str(self._path))
            socket.send_fds(self._connection, [bytes.fromhex(self.token)], [self._descriptor])
            taken = self._connection.recv(1)
        except OSError as problem:
            self._connection.close()
            raise LinkError(
                f"{self._path}: the daemon does not take standard input "
                f"({problem.strerror or problem}); is it running, and of this version and user?"
            ) from problem
        if taken != b"+":
            self._connection.close()
            raise BusyError(f"{self._path}: the daemon refused standard input; try again")
        self._connection.settimeout(None)
        threading.Thread(target=self._answer, name="handing", daemon=True).start()
        return self

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wrapped = _receive_text(self._connection, WRAPPED_BYTES_MAX)
                verdict, text = self._opened(wrapped)
                self._connection.sendall(verdict + _LENGTH.pack(len(text)) + text)

    def _opened(self, wrapped: bytes) -> tuple[bytes, bytes]:
        if self._unwrap is None:
            return b"-", b"expected an identity or a passphrase for an encrypted bundle, found none"
        try:
            return b"+", self._unwrap(wrapped)
        except Exception as problem:
            # The daemon raises it, and so it comes back.
            return b"-", str(problem).encode()[:TEXT_BYTES_MAX]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Wakes the thread that waits for a question.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
