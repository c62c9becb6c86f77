"""What link-v1-packed.bin holds: frames of the feature `packed`, built without a compressor, from
docs/link-protocol.md and RFC 8878 alone. Frozen. `tests/python/test_golden.py` compares it.
"""

import struct

from tests.golden.link_v1 import crc32c

MAGIC = struct.pack("<I", 0xFD2FB528)
RAW, RUN = 0, 1
"""Kinds of blocks inside a zstd frame."""


def zstd(length: int, *blocks: tuple[int, int, bytes]) -> bytes:
    """A zstd frame in a single segment: the size in 2 bytes (less 256), no checksum."""
    frame = MAGIC + bytes([0b0110_0000]) + struct.pack("<H", length - 256)
    for number, (kind, size, stored) in enumerate(blocks):
        last = number == len(blocks) - 1
        frame += struct.pack("<I", size << 3 | kind << 1 | last)[:3] + stored
    return frame


BLOCK = zstd(4096, (RUN, 4096, b"\xa5"))
MIXED = zstd(4608, (RUN, 4096, b"\x07"), (RAW, 256, bytes(range(256))), (RUN, 256, b"\0"))

# Of each frame: kind, number, offset, bytes of the blocks, and these as a zstd frame.
FRAMES = [
    (0x10, 5, 8192, 4096, BLOCK),
    (0x40, 106, 1 << 20, 4608, MIXED),
]


def stream() -> bytes:
    """All frames, one after the other."""
    sent = b""
    for count, (kind, number, offset, length, packed) in enumerate(FRAMES):
        payload = struct.pack("<II", length, 0) + packed
        head = struct.pack("<BBBBIQQ", kind, 2, 1, count, len(payload), number, offset)
        head += struct.pack("<I", crc32c(payload))
        sent += head + struct.pack("<I", crc32c(head)) + payload
    return sent
