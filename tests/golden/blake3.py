"""BLAKE3 as its paper defines it, slow and short: for tests that write bundles nobody makes yet.

Does not know: keys, derivation, outputs longer than 32 bytes.
"""

import struct

_START = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
_PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
_COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
_CHUNK_START, _CHUNK_END, _PARENT, _ROOT = 1, 2, 4, 8
_MASK = 0xFFFFFFFF


def _mix(v: list[int], place: tuple[int, ...], x: int, y: int) -> None:
    a, b, c, d = place
    for word, turns in ((x, (16, 12)), (y, (8, 7))):
        v[a] = (v[a] + v[b] + word) & _MASK
        v[d] = _turned(v[d] ^ v[a], turns[0])
        v[c] = (v[c] + v[d]) & _MASK
        v[b] = _turned(v[b] ^ v[c], turns[1])


def _turned(word: int, by: int) -> int:
    return (word >> by | word << (32 - by)) & _MASK


def _compress(chaining: tuple[int, ...], block: bytes, counter: int, flags: int) -> tuple[int, ...]:
    words = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    v = [*chaining, *_START[:4], counter & _MASK, counter >> 32, len(block), flags]
    for _ in range(7):
        for at, place in enumerate(_COLUMNS + _DIAGONALS):
            _mix(v, place, words[2 * at], words[2 * at + 1])
        words = [words[index] for index in _PERMUTATION]
    return tuple(v[at] ^ v[at + 8] for at in range(8))


def _chunk(content: bytes, counter: int, root: int) -> tuple[int, ...]:
    blocks = [content[at : at + 64] for at in range(0, len(content), 64)] or [b""]
    chaining: tuple[int, ...] = _START
    for at, block in enumerate(blocks):
        last = at == len(blocks) - 1
        flags = (_CHUNK_START if at == 0 else 0) | (_CHUNK_END | root if last else 0)
        chaining = _compress(chaining, block, counter, flags)
    return chaining


def _tree(content: bytes, counter: int, root: int) -> tuple[int, ...]:
    if len(content) <= 1024:
        return _chunk(content, counter, root)
    chunks = -(-len(content) // 1024)
    left = 1 << ((chunks - 1).bit_length() - 1)
    halves = (
        *_tree(content[: left * 1024], counter, 0),
        *_tree(content[left * 1024 :], counter + left, 0),
    )
    return _compress(_START, struct.pack("<16I", *halves), 0, _PARENT | root)


def blake3(content: bytes) -> bytes:
    """The digest of 32 bytes."""
    return struct.pack("<8I", *_tree(content, 0, _ROOT))
