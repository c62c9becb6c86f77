"""The golden files once more, read from the documents alone: no code of the core has a part in it.

So the documents, the frozen files and the core hold each other to account. `tests/golden` compares
the files with what the core writes and reads. Does not know: how any of it is implemented.
"""

import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import pytest

from tests.golden import link_v1_changes, link_v1_packed
from tests.golden.link_v1 import crc32c, stream

GOLDEN = Path(__file__).parent.parent / "golden"
VOLUME = UUID("6011d3a9-0000-4000-8000-000000000001")
SLOT = 4096
PAGE_BLOCKS = 504 * 64
BLOCKS = 2 * PAGE_BLOCKS + 1001
SIZE = (BLOCKS - 1) * 4096 + 512


class Header(NamedTuple):
    """A header slot of a map, as docs/formats.md draws it."""

    role: int
    volume: UUID
    size: int
    block_size: int
    planes: int
    generation: int
    sequence: int
    void_through: int
    base: tuple[int, ...]
    replica: bool
    oldest: tuple[int, int]
    newest: tuple[int, int]


def _header(slot: bytes) -> Header | None:
    magic, version, role, features, volume = struct.unpack_from("<8sHHI16s", slot)
    if crc32c(slot[:4092]) != int.from_bytes(slot[4092:], "little"):
        return None
    assert (magic, version) == (b"\x89DRM\r\n\x1a\n", 1)
    assert features in {0, 1}
    oldest, newest = struct.unpack_from("<QQ", slot, 80), struct.unpack_from("<QQ", slot, 96)
    assert not any(slot[112:4092])
    assert features or not any(slot[80:112])
    size, block_size, planes, generation, sequence, void = struct.unpack_from("<QIIQQQ", slot, 32)
    return Header(
        role,
        UUID(bytes=volume),
        size,
        block_size,
        planes,
        generation,
        sequence,
        void,
        tuple(slot[72:80]),
        bool(features),
        oldest,
        newest,
    )


class Page(NamedTuple):
    """A page slot that is whole."""

    sequence: int
    words: bytes


def _page(slot: bytes, plane: int, index: int) -> Page | None:
    magic, crc, sequence, number, of_plane, zero, volume = struct.unpack_from("<4sIQQII16s", slot)
    if magic != b"DRMP" or crc32c(slot[8:]) != crc:
        return None
    assert (number, of_plane, zero, UUID(bytes=volume)) == (index, plane, 0, VOLUME)
    assert not any(slot[48:64])
    return Page(sequence, slot[64:])


def _bits(page: Page, index: int) -> set[int]:
    held = int.from_bytes(page.words, "little")
    first = index * PAGE_BLOCKS
    return {first + at for at in range(PAGE_BLOCKS) if held >> at & 1}


class MapFile:
    """A map file: its newest header, the blocks set in each plane, what is torn."""

    def __init__(self, name: str) -> None:
        held = (GOLDEN / name).read_bytes()
        headers = [_header(held[at : at + SLOT]) for at in (0, SLOT)]
        self.header = max((h for h in headers if h is not None), key=lambda h: h.sequence)
        self.whole_headers = sum(header is not None for header in headers)
        blocks = -(-self.header.size // self.header.block_size)
        pages = -(-blocks // PAGE_BLOCKS)
        assert len(held) == 2 * SLOT + self.header.planes * pages * 2 * SLOT
        self.torn: list[tuple[int, int]] = []
        self.planes = [self._plane(held, plane, pages) for plane in range(self.header.planes)]

    def _plane(self, held: bytes, plane: int, pages: int) -> set[int]:
        found: set[int] = set()
        for index in range(pages):
            at = 2 * SLOT + (plane * pages + index) * 2 * SLOT
            slots = [held[at : at + SLOT], held[at + SLOT : at + 2 * SLOT]]
            read = [_page(slot, plane, index) for slot in slots if any(slot)]
            whole = [page for page in read if page is not None]
            if len(whole) < len(read):
                self.torn.append((plane, index))
            counting = [page for page in whole if page.sequence > self.header.void_through]
            if counting:
                found |= _bits(max(counting, key=lambda page: page.sequence), index)
            elif self.header.base[plane]:
                found |= set(range(index * PAGE_BLOCKS, min((index + 1) * PAGE_BLOCKS, BLOCKS)))
        return found


def _runs(*runs: tuple[int, int]) -> set[int]:
    return {block for start, end in runs for block in range(start, end)}


def test_the_overwrite_map_is_as_the_document_says() -> None:
    held = MapFile("overwrite-map-v1.bin")
    header = held.header
    assert header[:6] == (1, VOLUME, SIZE, 4096, 3, 4)
    assert held.whole_headers == 1
    last = BLOCKS - 1
    assert held.planes[0] == _runs(
        (0, 50), (60, 100), (200, 5000), (PAGE_BLOCKS - 256, PAGE_BLOCKS + 744), (last, BLOCKS)
    )
    assert held.planes[1] == _runs((50, 60))
    assert held.planes[2] == _runs((10, 20))
    assert held.torn == [(0, 1)]


def test_the_pages_of_an_earlier_generation_are_void() -> None:
    held = MapFile("overwrite-map-v1-voided.bin")
    assert held.header.generation == 9
    assert held.header.void_through > 0
    assert held.planes == [{7}, set(), set()]
    assert held.whole_headers == 2


def test_the_map_of_a_replica_is_as_the_document_says() -> None:
    held = MapFile("overwrite-map-v1-replica.bin")
    header = held.header
    assert (header.role, header.volume, header.generation) == (1, VOLUME, 3)
    assert (header.replica, header.oldest, header.newest) == (True, (3, 17), (3, 20))
    assert header.void_through > 0 or header.sequence > 1
    assert held.planes == [_runs((40, 45)), set(), set()]
    assert held.torn == []


def test_the_changed_map_is_as_the_document_says() -> None:
    held = MapFile("changed-map-v1.bin")
    assert (held.header.role, held.header.planes) == (2, 1)
    assert held.planes == [_runs((0, 2), (4000, 4064), (PAGE_BLOCKS, 2 * PAGE_BLOCKS))]
    assert held.torn == []


def test_the_preserved_map_is_as_the_document_says() -> None:
    held = MapFile("preserved-map-v1.bin")
    assert (held.header.role, held.header.planes) == (3, 2)
    assert held.planes == [_runs((30, 90)), _runs((30, 60))]
    assert held.torn == [(0, 2)]


def _intents(slot: bytes) -> tuple[int, list[int]] | None:
    magic, version, zero, features, volume = struct.unpack_from("<8sHHI16s", slot)
    sequence, extent, count, crc = struct.unpack_from("<QQII", slot, 32)
    if crc32c(slot[:52] + bytes(4) + slot[56:]) != crc:
        return None
    assert (magic, version, zero, features) == (b"\x89DRI\r\n\x1a\n", 1, 0, 0)
    assert (UUID(bytes=volume), extent) == (VOLUME, 1 << 20)
    assert not any(slot[56 + 4 * count :])
    return sequence, list(struct.unpack_from(f"<{count}I", slot, 56))


def _newest_intents(name: str) -> list[int]:
    held = (GOLDEN / name).read_bytes()
    assert len(held) == 2 * SLOT
    slots = [_intents(held[:SLOT]), _intents(held[SLOT:])]
    return max(slot for slot in slots if slot is not None)[1]


def test_the_intent_log_is_as_the_document_says() -> None:
    assert _newest_intents("intent-log-v1.bin") == [0, 7, 16_777_215]
    assert _newest_intents("intent-log-v1-full.bin") == list(range(0, 3000, 3))


@pytest.mark.parametrize(("name", "cuts"), [("catalogue-v1", 2), ("catalogue-v1-unclaimed", 0)])
def test_the_catalogue_is_as_the_document_says(name: str, cuts: int) -> None:
    line, _, body = (GOLDEN / f"{name}.txt").read_bytes().partition(b"\n")
    assert line.decode() == f"dualrestore-backup-catalogue 1 {crc32c(body):08x} {len(body)}"
    read = json.loads(body)
    assert set(read) == {
        "backup",
        "volume",
        "generation",
        "size",
        "block_size",
        "changed",
        "cuts",
    }
    assert len(read["cuts"]) == cuts
    for cut in read["cuts"]:
        assert set(cut) == {
            "snapshot",
            "label",
            "generation",
            "sequence",
            "created_ms",
            "selection",
            "changed",
            "kept",
        }


def test_the_bound_bundle_says_whose_it_is_where_the_document_says() -> None:
    segment = (GOLDEN / "bundle-v1-bound" / "seg-00000000.drs").read_bytes()
    header = segment[:SLOT]
    magic, major, minor, length = struct.unpack_from("<8sHHI", header)
    assert (magic, major, minor, length) == (b"\x89DRS\r\n\x1a\n", 1, 0, SLOT)
    generation, cut, base, size, block, number = struct.unpack_from("<QQQQII", header, 48)
    assert (UUID(bytes=header[32:48]), generation, cut) == (VOLUME, 6, 1234)
    assert (base, size, block, number) == (0, 128 << 10, 4096, 0)
    assert int.from_bytes(header[4060:4064], "little") == crc32c(header[:4060])
    trailer = segment[-SLOT:]
    assert trailer[:8] == b"DRStrail"
    batches, index = struct.unpack_from("<IQ", trailer, 12)
    assert (batches, index + SLOT) == (1, len(segment) - SLOT)
    assert int.from_bytes(trailer[64:68], "little") == crc32c(segment[index:-SLOT])


def test_the_frames_of_the_link_are_as_the_document_says() -> None:
    path = GOLDEN / "link-v1.bin"
    if os.environ.get("DUALRESTORE_GOLDEN") == "write":
        path.write_bytes(stream())
    assert path.read_bytes() == stream()


@pytest.mark.parametrize(
    ("feature", "frames"),
    [("changes", link_v1_changes.stream), ("packed", link_v1_packed.stream)],
    ids=["changes", "packed"],
)
def test_the_frames_of_a_feature_are_as_the_document_says(
    feature: str, frames: Callable[[], bytes]
) -> None:
    path = GOLDEN / f"link-v1-{feature}.bin"
    if os.environ.get("DUALRESTORE_GOLDEN") == "write":
        path.write_bytes(frames())
    assert path.read_bytes() == frames()


def test_the_descriptions_of_exported_snapshots_are_as_the_document_says() -> None:
    told = (GOLDEN / "exported-cut-v1.txt").read_text().splitlines()
    number, uuid = r"(0|[1-9][0-9]*)", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    text = re.compile(
        rf"dualrestore-cut 1 volume={uuid} generation={number} sequence={number} "
        rf"snapshot={uuid} block={number} included=(?P<included>all|unstated|[-0-9,]+)"
    )
    found = [matched["included"] for line in told if (matched := text.fullmatch(line))]
    assert found == ["all", "0-4096,8192-8704", "unstated"]
    assert all(len(line.encode()) <= 1024 for line in told)
