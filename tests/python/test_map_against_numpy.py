"""Maps against NumPy: marks, runs, pictures and bits of any pattern, at any edge."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import dualrestore as dr

Bits = NDArray[np.bool_]

BLOCK = 512
PAGE = 32_256
"""Blocks in one page of a map file."""
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 1]


def runs_of(bits: Bits, value: bool) -> list[tuple[int, int]]:
    """Runs of a value as (first, length), by differences."""
    padded = np.concatenate(([False], bits == value, [False])).astype(np.int8)
    steps = np.diff(padded)
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))


def in_blocks(extents: Iterable[dr.Extent], size: int, block: int) -> list[tuple[int, int]]:
    """Extents in blocks; the last block of the volume may be short."""
    found = []
    for extent in extents:
        assert extent.offset % block == 0
        assert extent.end % block == 0 or extent.end == size
        first = extent.offset // block
        found.append((first, -(-extent.end // block) - first))
    return found


def check(overwrite: dr.OverwriteMap, bits: Bits) -> None:
    """Every way to look at a map says what the array says."""
    size, block = overwrite.size, overwrite.block_size
    found = overwrite.to_numpy()
    assert found.dtype == np.bool_
    assert np.array_equal(found, bits)
    assert in_blocks(overwrite.current_extents(), size, block) == runs_of(bits, True)
    assert in_blocks(overwrite.missing_extents(), size, block) == runs_of(bits, False)
    lengths = np.full(bits.shape, block)
    lengths[-1] = size - (bits.size - 1) * block
    assert overwrite.current_bytes == int(lengths[bits].sum())
    assert overwrite.missing_bytes == int(lengths[~bits].sum())
    picture = overwrite.picture(7)
    assert sum(picture) == overwrite.current_bytes


def mark(overwrite: dr.OverwriteMap, bits: Bits) -> None:
    """Sets the bits, run by run."""
    for first, count in runs_of(bits, True):
        offset = first * overwrite.block_size
        length = min(count * overwrite.block_size, overwrite.size - offset)
        assert overwrite.mark_current(offset, length) == length


def tried(size: int, block: int, bits: Bits) -> None:
    """Makes a map with these bits, and looks at it before and after it is opened anew."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "map"
        with dr.OverwriteMap.create(path, size, block) as overwrite:
            check(overwrite, np.zeros(bits.shape, np.bool_))
            mark(overwrite, bits)
            check(overwrite, bits)
        with dr.OverwriteMap.open(path) as overwrite:
            check(overwrite, bits)


def patterns(blocks: int) -> list[Bits]:
    """Full, empty, alternating in words, halves and pages, one bit at either end."""
    index = np.arange(blocks)
    found = [index >= 0, index < 0, index == 0, index == blocks - 1]
    found += [index // stride % 2 == 0 for stride in (7, 64, 100, PAGE)]
    return found


@pytest.mark.parametrize("blocks", EDGES)
def test_patterns_read_back_whatever_the_number_of_blocks(blocks: int) -> None:
    for bits in patterns(blocks):
        tried(blocks * BLOCK, BLOCK, bits)
    # Every second block, and its opposite: the most runs that there can be.
    if blocks <= 513:
        tried(blocks * BLOCK, BLOCK, np.arange(blocks) % 2 == 0)
        tried(blocks * BLOCK, BLOCK, np.arange(blocks) % 2 == 1)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.one_of(st.sampled_from(EDGES), st.integers(1, 3 * PAGE)),
    block=st.sampled_from([512, 4096, 1 << 20]),
    tail=st.integers(1, 2048),
    density=st.sampled_from([0.001, 0.02, 0.5, 0.98]),
    stretch=st.sampled_from([1, 3, 64, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_maps_read_back(
    blocks: int, block: int, tail: int, density: float, stretch: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    bits = np.repeat(random.random(-(-blocks // stretch)) < density, stretch)[:blocks]
    if density == 0.5 and stretch == 1:
        bits = bits[:2000]
    size = (bits.size - 1) * block + min(tail * 512, block)
    tried(size, block, bits)


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.one_of(st.sampled_from(EDGES), st.integers(1, PAGE)),
    spans=st.lists(
        st.tuples(st.floats(0, 1), st.one_of(st.integers(0, 200), st.integers(0, PAGE))),
        max_size=30,
    ),
)
def test_marks_in_any_order_and_overlap_count_what_they_change(
    blocks: int, spans: list[tuple[float, int]]
) -> None:
    bits = np.zeros(blocks, np.bool_)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "map"
        with dr.OverwriteMap.create(path, blocks * BLOCK, BLOCK) as overwrite:
            for where, count in spans:
                first = min(int(where * blocks), blocks - 1)
                end = min(first + count, blocks)
                fresh = int((~bits[first:end]).sum())
                changed = overwrite.mark_current(first * BLOCK, (end - first) * BLOCK)
                assert changed == fresh * BLOCK
                bits[first:end] = True
                for start, stop in ((first, end), (max(first - 1, 0), end), (0, blocks)):
                    if start < stop:
                        length = (stop - start) * BLOCK
                        assert overwrite.is_current(start * BLOCK, length) == bits[start:stop].all()
            check(overwrite, bits)


def test_a_map_of_16_tib_is_scanned_empty_and_with_bits_at_its_ends(tmp_path: Path) -> None:
    size = 16 << 40
    with dr.OverwriteMap.create(tmp_path / "map", size, 1 << 20) as overwrite:
        assert list(overwrite.missing_extents()) == [dr.Extent(0, size)]
        assert not overwrite.to_numpy().any()
        overwrite.mark_current(0, 1 << 20)
        overwrite.mark_current(size - (1 << 20), 1 << 20)
        assert np.flatnonzero(overwrite.to_numpy()).tolist() == [0, (size >> 20) - 1]
        assert list(overwrite.missing_extents()) == [dr.Extent(1 << 20, size - (2 << 20))]
