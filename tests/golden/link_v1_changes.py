"""What link-v1-changes.bin holds: the frames of the feature `changes`, built from
docs/link-protocol.md alone. Frozen. `tests/python/test_golden.py` compares it.
"""

import struct

from tests.golden.link_v1 import GENERATION, SNAPSHOT, crc32c

REQUEST = struct.pack("<Q", 8 << 30) + SNAPSHOT + struct.pack("<QQ", GENERATION, 12345)
RUNS = struct.pack("<II", 262144, 3) + struct.pack("<IIIIII", 0, 1, 7, 2, 262143, 1)
BITS = struct.pack("<II", 13, 0xFFFFFFFF) + bytes([0xA5, 0x11])

# Of each frame: kind, number, offset and payload.
FRAMES = [
    (0x32, 104, 1 << 20, REQUEST),
    (0x43, 104, 1 << 20, RUNS),
    (0x43, 105, 0, BITS),
]


def stream() -> bytes:
    """All frames, one after the other."""
    sent = b""
    for count, (kind, number, offset, payload) in enumerate(FRAMES):
        head = struct.pack("<BBBBIQQ", kind, 0, 1, count, len(payload), number, offset)
        head += struct.pack("<I", crc32c(payload))
        sent += head + struct.pack("<I", crc32c(head)) + payload
    return sent
