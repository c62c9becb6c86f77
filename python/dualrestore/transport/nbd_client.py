"""A small NBD client: one connection, blocking, several requests in flight if wanted.

Guarantees: every reply is matched to its request; an error of the server is raised with its errno.
Speaks the fixed newstyle handshake and simple replies. Does not know: what the blocks mean.
"""

import errno as codes
import socket
import struct
from types import TracebackType
from typing import Self

from dualrestore.config import Address, Export, UnixExport
from dualrestore.errors import DeviceError, FormatError, LinkError

_GREETING = (0x4E42444D41474943, 0x49484156454F5054)
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_GO, _ACK, _INFORMATION = 7, 1, 3
_READ, _WRITE, _DISCONNECT, _FLUSH, _TRIM, _ZEROES = 0, 1, 2, 3, 4, 6
FORCE_UNIT_ACCESS = 1
REPLY_BYTES_MAX = 1 << 16


class NbdClient:
    """One connection to one export. A context manager."""

    def __init__(self, where: Export | Address, name: str, timeout: float = 60.0) -> None:
        place = f"{where}"
        try:
            if isinstance(where, UnixExport):
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.settimeout(timeout)
                self._socket.connect(str(where.path))
            else:
                address = where if isinstance(where, Address) else where.address
                self._socket = socket.create_connection((address.host, address.port), timeout)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as problem:
            raise LinkError(f"{place}: cannot connect: {problem.strerror or problem}") from problem
        self._reader = self._socket.makefile("rb", buffering=1 << 16)
        self._cookie = 0
        self._reads: dict[int, int] = {}
        self.size = 0
        self.flags = 0
        try:
            self._negotiate(name)
        except BaseException:
            self.close(polite=False)
            raise

    def _exactly(self, count: int) -> bytes:
        try:
            received: bytes = self._reader.read(count)
        except TimeoutError as problem:
            raise LinkError("the NBD server did not answer in time") from problem
        except OSError as problem:
            raise LinkError(f"the NBD connection was lost: {problem.strerror}") from problem
        if len(received) < count:
            raise LinkError("the NBD server closed the connection")
        return received

    def _negotiate(self, name: str) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self._exactly(18))
        if (magic, option_magic) != _GREETING or not flags & 1:
            raise FormatError("expected an NBD server that speaks fixed newstyle, found another")
        encoded = name.encode()
        payload = struct.pack(">I", len(encoded)) + encoded + struct.pack(">H", 0)
        self._socket.sendall(
            struct.pack(">I", flags & 0b11)
            + struct.pack(">QII", option_magic, _GO, len(payload))
            + payload
        )
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._exactly(20))
            if magic != _OPTION_REPLY_MAGIC or option != _GO or length > REPLY_BYTES_MAX:
                raise FormatError("expected an NBD option reply, found something else")
            reply = self._exactly(length)
            if kind == _ACK:
                return
            if kind & 2**31:
                text = reply.decode("utf-8", "replace") or f"error {kind & 0x7FFFFFFF}"
                raise DeviceError(codes.ENOENT, f"export {name!r} refused: {text}")
            if kind == _INFORMATION and reply[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", reply[2:12])

    def send(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> int:
        """Sends a request, returns its cookie."""
        self._cookie += 1
        header = struct.pack(
            ">IHHQQI", _REQUEST_MAGIC, flags, command, self._cookie, offset, length
        )
        try:
            self._socket.sendall(header + data if len(data) < 1 << 16 else header)
            if len(data) >= 1 << 16:
                self._socket.sendall(data)
        except OSError as problem:
            raise LinkError(
                f"the NBD connection was lost: {problem.strerror or problem}"
            ) from problem
        self._reads[self._cookie] = length if command == _READ else 0
        return self._cookie

    def receive(self) -> tuple[int, bytes]:
        """The next reply: (cookie, bytes of a read)."""
        magic, error, cookie = struct.unpack(">IIQ", self._exactly(16))
        if magic != _REPLY_MAGIC or cookie not in self._reads:
            raise FormatError("expected the reply to one of our NBD requests, found another")
        length = self._reads.pop(cookie)
        if error:
            raise DeviceError(error, f"the NBD server answered {codes.errorcode.get(error, error)}")
        return cookie, self._exactly(length) if length else b""

    def send_write(self, offset: int, data: bytes) -> int:
        """Sends a write without waiting."""
        return self.send(_WRITE, offset, len(data), data)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the volume."""
        self.send(_READ, offset, length)
        return self.receive()[1]

    def write(self, offset: int, data: bytes, *, force_unit_access: bool = False) -> None:
        """Writes; with `force_unit_access` durable as if a flush followed."""
        flags = FORCE_UNIT_ACCESS if force_unit_access else 0
        self.send(_WRITE, offset, len(data), data, flags)
        self.receive()

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeros afterwards."""
        self.send(_ZEROES, offset, length)
        self.receive()

    def trim(self, offset: int, length: int) -> None:
        """The contents of the range are not needed."""
        self.send(_TRIM, offset, length)
        self.receive()

    def flush(self) -> None:
        """What was answered before is durable afterwards."""
        self.send(_FLUSH)
        self.receive()

    def close(self, *, polite: bool = True) -> None:
        """Says good-bye and closes. May be called twice."""
        if self._socket.fileno() < 0:
            return
        if polite:
            header = struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0)
            try:
                self._socket.sendall(header)
            except OSError:
                polite = False
        self._reader.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(polite=kind is None)
