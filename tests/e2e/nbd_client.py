"""A small NBD client of our own: one request at a time, so that a test knows what was answered.

Guarantees: every answer is checked against its request; an error reply raises `OSError` with the
errno of the protocol. Does not know: block status, TLS, structured replies (asks for none).
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = b"NBDMAGICIHAVEOPT"
OPTION_GO = 7
REPLY_ACK, REPLY_INFO = 1, 3
INFO_EXPORT = 0
REPLY_ERROR = 1 << 31
READ, WRITE, CLOSE, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
TIMEOUT_SECONDS = 60.0


class NbdClient:
    """One connection to an export."""

    def __init__(self, server: Path | socket.socket, export: str) -> None:
        """`server`: the path of its socket, or a socket that leads to it."""
        leads_there = isinstance(server, socket.socket)
        self._socket = (
            server
            if isinstance(server, socket.socket)
            else socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        )
        self._socket.settimeout(TIMEOUT_SECONDS)
        self._handle = 0
        self.size = 0
        self.flags = 0
        try:
            if not leads_there:
                self._socket.connect(str(server))
            self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> NbdClient:
        """Itself."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Disconnects."""
        self.close()

    def _receive(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            parts += part
        return bytes(parts)

    def _negotiate(self, export: bytes) -> None:
        greeting = self._receive(18)
        assert greeting[:16] == MAGIC, greeting
        self._socket.sendall(struct.pack(">I", 3))
        body = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._socket.sendall(b"IHAVEOPT" + struct.pack(">II", OPTION_GO, len(body)) + body)
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._receive(20))
            assert (magic, option) == (0x3E889045565A9, OPTION_GO)
            payload = self._receive(length)
            if kind & REPLY_ERROR:
                raise ConnectionRefusedError(
                    f"export {export!r}: {payload.decode(errors='replace')}"
                )
            if kind == REPLY_ACK:
                return
            if kind == REPLY_INFO and struct.unpack(">H", payload[:2])[0] == INFO_EXPORT:
                self.size, self.flags = struct.unpack(">QH", payload[2:12])

    def _request(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> bytes:
        self._handle += 1
        header = struct.pack(
            ">IHHQQI", 0x25609513, flags, command, self._handle, offset, length or len(data)
        )
        self._socket.sendall(header + data)
        magic, error, handle = struct.unpack(">IIQ", self._receive(16))
        assert (magic, handle) == (0x67446698, self._handle)
        if error:
            raise OSError(error, f"NBD command {command} at {offset} was answered with an error")
        return self._receive(length) if command == READ else b""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of the range."""
        return self._request(READ, offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        """Returns when the write is acknowledged."""
        self._request(WRITE, offset, data=data, flags=FUA if fua else 0)

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards."""
        self._request(WRITE_ZEROES, offset, length)

    def trim(self, offset: int, length: int) -> None:
        """Whole blocks of the range read as zeros afterwards."""
        self._request(TRIM, offset, length)

    def flush(self) -> None:
        """Everything acknowledged before is durable when it returns."""
        self._request(FLUSH)

    def close(self) -> None:
        """Says goodbye and closes; may be called twice."""
        try:
            self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, CLOSE, 0, 0, 0))
        except OSError:
            pass  # The server is gone: there is nobody to say goodbye to.
        finally:
            self._socket.close()
