"""What link-v1.bin holds: one of every frame, built from docs/link-protocol.md alone.

It shares no code with the core, so that the document, the file and the core hold each other to
account. Frozen with version 1 of the protocol. `tests/python/test_golden.py` compares it.
"""

import struct

VOLUME = bytes(range(0x10, 0x20))
PRIMARY_BOOT = bytes(range(0x20, 0x30))
BACKUP_BOOT = bytes(range(0x30, 0x40))
SNAPSHOT = bytes(range(0x40, 0x50))
BACKUP = bytes(range(0x50, 0x60))
DIGEST = bytes(range(0x60, 0x80))
SIZE = 10 << 30
GENERATION = 3
EPOCH = 7


def crc32c(block: bytes) -> int:
    """The Castagnoli checksum, bit by bit."""
    register = 0xFFFFFFFF
    for byte in block:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def words(code: int, errno: int, text: str) -> bytes:
    """The payload of Refuse, Goodbye, Failed and FetchFailed."""
    return struct.pack("<HHI", code, 0, errno) + text.encode()


HELLO = (
    struct.pack("<4sHHQQ", b"DRLK", 1, 1, 0, 0)
    + struct.pack("<BBHIQQQ", 2, 1, len("db"), 4096, SIZE, GENERATION, EPOCH)
    + VOLUME
    + PRIMARY_BOOT
    + BACKUP_BOOT
    + b"db"
)
WELCOME = (
    struct.pack("<4sHBBQ", b"DRLK", 1, 2, 0, 0)
    + struct.pack("<IIQQQQ", 4096, 0, SIZE, GENERATION, EPOCH, 0)
    + VOLUME
    + BACKUP_BOOT
    + BACKUP
)
LABEL = "nächtlich"
CUT = (
    SNAPSHOT
    + struct.pack("<IHH", 2, len(LABEL.encode()), 0)
    + struct.pack("<QQQQ", 0, 4096, 1 << 20, 512)
    + LABEL.encode()
)
BLOCK = bytes(index % 251 for index in range(4096))

# Of each frame: kind, flags, number, offset and payload.
FRAMES = [
    (0x01, 0, 0, 0, HELLO),
    (0x02, 0, 0, 0, WELCOME),
    (0x03, 0, 0, 0, words(7, 0, "stale generation")),
    (0x04, 0, 0, 0, words(3, 0, "stopping")),
    (0x05, 0, 41, 0, b""),
    (0x06, 0, 41, 0, b""),
    (0x10, 0, 1, 8192, BLOCK),
    (0x11, 0, 2, 1 << 20, struct.pack("<Q", 8 << 30)),
    (0x12, 0, 3, 0, b""),
    (0x13, 0, 4, 0, CUT),
    (0x20, 0, 2, 0, b""),
    (0x21, 0, 3, 0, b""),
    (0x22, 0, 4, 0, SNAPSHOT + struct.pack("<QQ", GENERATION, 12345)),
    (0x23, 0, 1, 0, words(5, 28, "no space left")),
    (0x30, 0, 100, 4096, struct.pack("<IIQ", 131072, 0, 2)),
    (0x31, 0, 101, 0, struct.pack("<IIQ", 16 << 20, 0, 0)),
    (0x40, 0, 100, 4096, BLOCK[:512]),
    (0x40, 1, 102, 8192, struct.pack("<Q", 65536)),
    (0x41, 0, 103, 0, words(3, 0, "damaged")),
    (0x42, 0, 101, 0, DIGEST),
]


def stream() -> bytes:
    """All frames, one after the other."""
    sent = b""
    for count, (kind, flags, number, offset, payload) in enumerate(FRAMES):
        head = struct.pack("<BBBBIQQ", kind, flags, 1, count, len(payload), number, offset)
        head += struct.pack("<I", crc32c(payload))
        sent += head + struct.pack("<I", crc32c(head)) + payload
    return sent
