"""What an NBD client may say before TLS: greeting, flags, and STARTTLS, as a state machine.

| state | client says | we answer | next |
|---|---|---|---|
| flags | 4 bytes, known bits, with FIXED_NEWSTYLE | nothing | options |
| flags | anything else | nothing | closed |
| options | STARTTLS without payload, nothing after it | ACK | tls |
| options | STARTTLS with payload | ERR_INVALID | options |
| options | bytes after STARTTLS | nothing | closed (plaintext injection) |
| options | ABORT | ACK | closed |
| options | EXPORT_NAME | nothing | closed (it has no error reply) |
| options | anything else | ERR_TLS_REQD | options |

Guarantees: nothing about exports is said before TLS; limits on count and size of options.
Does not know: sockets, TLS itself.
"""

import struct
from typing import Literal

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 0b11)
"""NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE and NO_ZEROES."""
FLAGS_BYTES = 4
OPTION_HEADER_BYTES = 16
OPTION_BYTES_MAX = 8192
OPTIONS_MAX = 64

_OPTION_MAGIC = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _STARTTLS = 1, 2, 5
_ACK, _ERR_INVALID, _ERR_TLS_REQUIRED = 1, 2**31 + 3, 2**31 + 5

State = Literal["flags", "options", "tls", "closed"]


class PlainNegotiation:
    """Feed it what the client says; send what `receive` returns, then look at `state`."""

    def __init__(self) -> None:
        self.state: State = "flags"
        self.client_flags = b""
        self._held = bytearray()
        self._options = 0

    def receive(self, received: bytes) -> bytes:
        """Takes bytes of the client, returns the answer."""
        self._held += received
        answer = bytearray()
        while True:
            before = len(self._held)
            if self.state == "flags":
                self._take_flags()
            elif self.state == "options":
                answer += self._take_option()
            if self.state == "tls" and self._held:
                self.state = "closed"
                return b""
            if len(self._held) == before or self.state in {"tls", "closed"}:
                return bytes(answer)

    def _take_flags(self) -> None:
        if len(self._held) < FLAGS_BYTES:
            return
        self.client_flags = bytes(self._held[:FLAGS_BYTES])
        del self._held[:FLAGS_BYTES]
        (flags,) = struct.unpack(">I", self.client_flags)
        self.state = "options" if flags & 1 and not flags & ~0b11 else "closed"

    def _take_option(self) -> bytes:
        if len(self._held) < OPTION_HEADER_BYTES:
            return b""
        magic, option, length = struct.unpack_from(">QII", self._held)
        is_within_limits = magic == _OPTION_MAGIC and length <= OPTION_BYTES_MAX
        if not is_within_limits or self._options >= OPTIONS_MAX:
            self.state = "closed"
            return b""
        if len(self._held) < OPTION_HEADER_BYTES + length:
            return b""
        del self._held[: OPTION_HEADER_BYTES + length]
        self._options += 1
        if option == _EXPORT_NAME:
            self.state = "closed"
            return b""
        if option == _ABORT:
            self.state = "closed"
            return _reply(option, _ACK)
        if option == _STARTTLS:
            if length:
                return _reply(option, _ERR_INVALID)
            self.state = "tls"
            return _reply(option, _ACK)
        return _reply(option, _ERR_TLS_REQUIRED)


def _reply(option: int, kind: int) -> bytes:
    return struct.pack(">QIII", _REPLY_MAGIC, option, kind, 0)
