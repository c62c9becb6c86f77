"""Sectors that say where they belong and how old they are.

| words (8 bytes, little-endian) | of a sector of 512 bytes |
|---|---|
| 0 | magic |
| 1 | number of the sector in the volume |
| 2 | sequence number of the write |
| 3 to 62 | filler, a function of 1 and 2 |
| 63 | checksum of the words before |

Guarantees: content is a function of (sector, sequence), so a shadow needs only sequence numbers;
sequence 0 means zeros. Stale, torn, misplaced and foreign sectors are told from each other.
"""

from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

SECTOR_BYTES = 512
WORDS = SECTOR_BYTES // 8

Words = NDArray[numpy.uint64]

_MAGIC = numpy.uint64(0x31504D4154535244)
_MIX_SECTOR = numpy.uint64(0x9E3779B97F4A7C15)
_MIX_SEQUENCE = numpy.uint64(0xC2B2AE3D27D4EB4F)
_COLUMNS = (numpy.arange(1, WORDS, dtype=numpy.uint64) * _MIX_SECTOR) | numpy.uint64(1)
"""Odd, so that a change of any one word changes the checksum."""


def stamp(sectors: Words, sequences: Words) -> Words:
    """The contents of sectors; shape (n, 64)."""
    words = numpy.empty((len(sectors), WORDS), dtype="<u8")
    words[:, 0] = _MAGIC
    words[:, 1] = sectors
    words[:, 2] = sequences
    seeds = (sectors * _MIX_SECTOR) ^ (sequences * _MIX_SEQUENCE)
    numpy.multiply(seeds[:, None], _COLUMNS[None, 2:-1], out=words[:, 3:-1])
    words[:, -1] = checksum(words)
    if not sequences.all():
        words[sequences == 0] = 0
    return words


def checksum(words: Words) -> Words:
    """Of all words but the last."""
    sums: Words = numpy.einsum("ij,j->i", words[:, :-1], _COLUMNS)
    return sums


@dataclass
class Findings:
    """How many sectors are not what the shadow says."""

    stale: int = 0
    """Whole and in place, but older than the last acknowledged write."""
    wrong: int = 0
    """Torn, misplaced, foreign, or newer than anything written."""

    def add(self, other: "Findings") -> None:
        """Counts those of another examination too."""
        self.stale += other.stale
        self.wrong += other.wrong


def examine(found: bytes | bytearray | memoryview, first: int, sequences: Words) -> Findings:
    """Compares bytes that begin at sector `first` with what the shadow says of them."""
    words = numpy.frombuffer(found, dtype="<u8").reshape(-1, WORDS)
    sectors = numpy.arange(first, first + len(words), dtype=numpy.uint64)
    right = stamp(sectors, sequences)
    if numpy.array_equal(words, right):
        return Findings()
    different = (words != right).any(axis=1)
    bad, places, expected = words[different], sectors[different], sequences[different]
    is_whole = (bad[:, 0] == _MAGIC) & (bad[:, -1] == checksum(bad)) & (bad[:, 1] == places)
    is_zero = ~bad.any(axis=1)
    is_stale = (is_whole & (bad[:, 2] < expected)) | is_zero
    stale = int(is_stale.sum())
    return Findings(stale, len(bad) - stale)
