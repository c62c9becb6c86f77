"""Block devices with sectors of 512 and 4096 bytes, and sparse files, as sources and targets of
bundles and merges.

Guarantees: nothing stays attached. Does not know: daemons.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.harness import MIB, PROGRAM, run
from tests.e2e.test_bad_input_disks import loop

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 12 * MIB
GRAIN = 64 << 10
GROUND = b"\xee"


def product(*words: object) -> dict[str, Any]:
    """Runs a verb with --json; what it said."""
    told: dict[str, Any] = json.loads(run([PROGRAM, *map(str, words), "--json"]).stdout)
    return told


def volume(size: int) -> bytes:
    """Noise, text, zeros, and a tail that is not zero."""
    noise = random.Random(size)
    parts = [
        noise.randbytes(2 * MIB + 4096),
        bytes(3 * MIB),
        b"a line of text. " * (MIB // 16),
        bytes(GRAIN),
        noise.randbytes(GRAIN),
    ]
    content = b"".join(parts)
    return content + bytes(size - len(content) - 4096) + noise.randbytes(4096)


def sparse(path: Path, content: bytes, ground: bool = False) -> None:
    """A file whose zeros are holes; or one with GROUND in it everywhere."""
    with path.open("wb") as file:
        if ground:
            file.write(GROUND * len(content))
            return
        for at in range(0, len(content), 4096):
            block = content[at : at + 4096]
            if block.count(0) != len(block):
                file.seek(at)
                file.write(block)
        file.truncate(len(content))


def allocated(path: Path) -> int:
    """Bytes on the disk."""
    os.sync()
    return path.stat().st_blocks * 512


@pytest.mark.root
@pytest.mark.parametrize(
    ("source_sector", "target_sector"), list(itertools.product([512, 4096], repeat=2))
)
def test_a_device_goes_through_a_bundle_into_one_of_any_sectors(
    tmp_path: Path, source_sector: int, target_sector: int
) -> None:
    # A tail of whole sectors of both, which is no whole block of the map.
    size = SIZE + 4096
    block = 8192
    content = volume(size)
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, content)
    sparse(target, content, ground=True)
    with (
        loop(source, "--sector-size", str(source_sector)) as from_device,
        loop(target, "--sector-size", str(target_sector)) as to_device,
    ):
        for compression in ("none", "zstd"):
            bundle, over = tmp_path / f"{compression}.drb", tmp_path / f"{compression}.map"
            product("bundle", "create", from_device, "--to", bundle, "--compress", compression)
            assert product("bundle", "verify", bundle)["sound"]
            product("map", "create", over, "--size", size, "--block-size", block)
            newer = f"{MIB}-{MIB + block}"
            product("map", "mark", over, newer)
            report = product("merge", bundle, to_device, "--map", over)
            assert report["bytes_written"] == size - block
            assert product("map", "show", over)["missing_bytes"] == 0
    # The first merge left the block that it was told is newer; so did the second.
    expected = content[:MIB] + GROUND * block + content[MIB + block :]
    assert target.read_bytes() == expected


@pytest.mark.root
def test_a_device_is_merged_as_it_is_without_a_bundle(tmp_path: Path) -> None:
    content = volume(SIZE)
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, content)
    sparse(target, content, ground=True)
    over = tmp_path / "over.map"
    with (
        loop(source, "--sector-size", "4096") as from_device,
        loop(target, "--sector-size", "512") as to_device,
    ):
        product("map", "create", over, "--size", SIZE)
        report = product("merge", from_device, to_device, "--map", over)
        assert report["bytes_written"] == SIZE
    assert target.read_bytes() == content


@pytest.mark.parametrize("tail", [0, 512, 4096 + 1536])
@pytest.mark.parametrize("way", ["bundle", "packed", "image"])
def test_what_was_sparse_is_sparse_and_the_same_after_a_merge(
    tmp_path: Path, tail: int, way: str
) -> None:
    content = volume(SIZE + tail)
    size = len(content)
    source, target, over = tmp_path / "source", tmp_path / "target", tmp_path / "over.map"
    sparse(source, content)
    target.touch()
    os.truncate(target, size)
    medium = source
    if way != "image":
        medium = tmp_path / "bundle"
        compression = "zstd" if way == "packed" else "none"
        product("bundle", "create", source, "--to", medium, "--compress", compression)
    product("map", "create", over, "--size", size)
    report = product("merge", medium, target, "--map", over)
    assert report["bytes_written"] == size
    assert target.read_bytes() == content
    # Zeros are told apart in grains.
    data = sum(GRAIN for at in range(0, size, GRAIN) if any(content[at : at + GRAIN]))
    assert data < 6 * MIB
    assert allocated(source) <= allocated(target) <= data + GRAIN


@pytest.mark.parametrize("way", ["bundle", "image"])
def test_a_merge_makes_holes_where_old_bytes_were_and_the_volume_is_zero(
    tmp_path: Path, way: str
) -> None:
    content = volume(SIZE)
    source, target, over = tmp_path / "source", tmp_path / "target", tmp_path / "over.map"
    sparse(source, content)
    sparse(target, content, ground=True)
    medium = source
    if way == "bundle":
        medium = tmp_path / "bundle"
        product("bundle", "create", source, "--to", medium)
    product("map", "create", over, "--size", SIZE)
    product("merge", medium, target, "--map", over)
    assert target.read_bytes() == content
    assert allocated(target) < 6 * MIB, "3 MiB and more of zeros are holes again"
