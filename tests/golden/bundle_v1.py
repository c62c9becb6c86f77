"""Bundles of version 1, read from docs/formats.md alone, with every check that it names.

It shares no code with the core, so that the document, the files and the core hold each other to
account. `tests/python/test_golden_bundle.py` uses it. Does not know: zstd, encryption.
"""

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from tests.golden.blake3 import blake3
from tests.golden.link_v1 import crc32c

PAGE = 4096
DATA, ZERO = 1, 3
INCREMENTAL = 2
Run = tuple[int, int]


class Piece(NamedTuple):
    """A range of the volume; `content` is None where it is zero."""

    start: int
    end: int
    content: bytes | None


def check_page(page: bytes, at: int, context: bytes) -> bytes:
    """The BLAKE3 that stands in the checks of a page, if both are right."""
    rest = page[:at] + page[at + 36 :]
    assert int.from_bytes(page[at : at + 4], "little") == crc32c(rest)
    assert page[at + 4 : at + 36] == blake3(context + rest)
    return page[at + 4 : at + 36]


def manifest(path: Path) -> dict[str, Any]:
    """A manifest whose check is right, without it."""
    text = path.read_bytes()
    body, comma, check = text.rpartition(b',\n  "check": "')
    assert comma
    assert check == f'{crc32c(body):08x}-{blake3(body).hex()}"\n}}\n'.encode()
    read: dict[str, Any] = json.loads(text)
    del read["check"]
    return read


class Segment:
    """A segment file, checked from its header to its trailer."""

    def __init__(self, held: bytes, begin: dict[str, Any], begin_bytes: bytes) -> None:
        self.held = held
        self.begin = begin
        self.header_hash = check_page(held[:PAGE], 4060, b"")
        self._check_header(blake3(begin_bytes))
        self.pieces: list[Piece] = []
        self.hashes: list[bytes] = []
        self.index: list[tuple[int, ...]] = []
        at = PAGE
        while held[at : at + 4] == b"DRBT":
            at = self._batch(at)
        self._check_end(at)

    def _check_header(self, begin_hash: bytes) -> None:
        magic, major, minor, length = struct.unpack_from("<8sHHI", self.held)
        assert (magic, major, minor, length) == (b"\x89DRS\r\n\x1a\n", 1, 0, PAGE)
        begin = self.begin
        volume = begin["volume"]
        assert UUID(bytes=self.held[16:32]) == UUID(begin["bundle"])
        assert UUID(bytes=self.held[32:48]) == UUID(volume or 32 * "0")
        generation, cut, base, size, block, self.number, features = struct.unpack_from(
            "<QQQQIIQ", self.held, 48
        )
        assert (generation, cut) == (begin["generation"], begin["cut"])
        assert (size, block) == (begin["size"], begin["block_size"])
        incremental = "incremental" in begin["features"]
        assert features == (INCREMENTAL if incremental else 0)
        assert base == (begin["base"]["cut"] if incremental else 0)
        assert self.held[96:128] == begin_hash
        assert not any(self.held[128:4060])

    def _batch(self, at: int) -> int:
        descriptors: list[tuple[Any, ...]] = []
        position, number, pages, count, payload_pages = at, len(self.index), 1, 0, 0
        seen = 0
        while seen < pages:
            page = self.held[at : at + PAGE]
            magic, segment, batch, of, pages, count, payload_pages, zero = struct.unpack_from(
                "<4sIIHHIII", page
            )
            assert (magic, segment, batch, of, zero) == (b"DRBT", self.number, number, seen, 0)
            self.hashes.append(check_page(page, 28, self.header_hash))
            here = min(63, count - len(descriptors))
            slots = range(64, 64 + 64 * here, 64)
            descriptors += [struct.unpack_from("<QQB3sIII32s", page, slot) for slot in slots]
            assert not any(page[64 + 64 * here :])
            at, seen = at + PAGE, seen + 1
        payload = self.held[at : at + payload_pages * PAGE]
        next_page = 0
        for offset, length, kind, zeros, stored, first, crc, digest in descriptors:
            assert zeros == bytes(3)
            content = None
            if kind == DATA:
                assert (stored, first) == (length, next_page)
                content = payload[first * PAGE : first * PAGE + stored]
                assert (crc32c(content), blake3(content)) == (crc, digest)
                next_page += -(-stored // PAGE)
                assert not any(payload[first * PAGE + stored : next_page * PAGE])
            else:
                assert (kind, stored, first, crc, digest) == (ZERO, 0, 0, 0, bytes(32))
            assert not self.pieces or self.pieces[-1].end <= offset
            self.pieces.append(Piece(offset, offset + length, content))
        assert next_page == payload_pages
        span = descriptors[0][0], sum(descriptors[-1][:2])
        self.index.append((*span, position // PAGE, pages, 0, count, 0))
        return at + payload_pages * PAGE

    def _check_end(self, at: int) -> None:
        trailer = self.held[-PAGE:]
        check_page(trailer, 4060, self.header_hash)
        magic, number, batches, position, chunks = struct.unpack_from("<8sIIQQ", trailer)
        assert (magic, number, batches) == (b"DRStrail", self.number, len(self.index))
        assert (position, chunks) == (at, len(self.pieces))
        index = self.held[at:-PAGE]
        entries = [struct.unpack_from("<QQIHHII", index, 32 * at) for at in range(batches)]
        assert entries == self.index
        assert not any(index[32 * batches :])
        crc, zero = struct.unpack_from("<II", trailer, 64)
        assert (crc, zero) == (crc32c(index), 0)
        assert trailer[72:104] == blake3(index)
        self.root = blake3(b"".join(self.hashes))
        assert trailer[104:136] == self.root
        assert not any(trailer[136:4060])
        self.totals = struct.unpack_from("<QQQQ", trailer, 32)

    @property
    def coverage(self) -> list[Run]:
        """The runs that it speaks of."""
        runs: list[Run] = []
        for piece in self.pieces:
            if runs and runs[-1][1] == piece.start:
                runs[-1] = (runs[-1][0], piece.end)
            else:
                runs.append((piece.start, piece.end))
        return runs


class Medium:
    """One directory of a bundle; everything in it agrees."""

    def __init__(self, directory: Path) -> None:
        self.begin_bytes = (directory / "manifest.begin.json").read_bytes()
        self.begin = manifest(directory / "manifest.begin.json")
        self.manifest = manifest(directory / "manifest.json")
        assert self.begin["format"] == "dualrestore bundle, begun"
        assert (self.manifest["format"], self.manifest["version"]) == ("dualrestore bundle", 1)
        assert self.manifest["begin"] == self.begin
        assert self.manifest["begin_hash"] == blake3(self.begin_bytes).hex()
        self.segments = []
        for entry in self.manifest["segments"]:
            held = (directory / entry["name"]).read_bytes()
            segment = Segment(held, self.begin, self.begin_bytes)
            data, zero, unreadable, stored = segment.totals
            assert entry == {
                "name": f"seg-{segment.number:08d}.drs",
                "number": segment.number,
                "bytes": len(held),
                "header_hash": segment.header_hash.hex(),
                "root": segment.root.hex(),
                "chunks": len(segment.pieces),
                "data_bytes": data,
                "zero_bytes": zero,
                "unreadable_bytes": unreadable,
                "stored_bytes": stored,
                "coverage": [list(run) for run in segment.coverage],
            }
            assert sum(end - start for start, end in segment.coverage) == data + zero + unreadable
            self.segments.append(segment)
        root = blake3(b"".join(segment.root for segment in self.segments))
        assert self.manifest["root"] == root.hex()

    @property
    def pieces(self) -> list[Piece]:
        """All of them, in order."""
        return [piece for segment in self.segments for piece in segment.pieces]
