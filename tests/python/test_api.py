"""The Python API: maps, bundles and merges on plain files."""

import os
import tempfile
from pathlib import Path

import numpy
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import dualrestore as dr

BLOCK = 4096
LOCATIONS = 6


def content(label: str) -> bytes:
    """The block that the figures name so, such as 3b."""
    return label.encode().ljust(8) * (BLOCK // 8)


def volume(*labels: str) -> bytes:
    return b"".join(content(label) for label in labels)


def test_the_merge_of_figure_3b_writes_blocks_2_and_5_only(tmp_path: Path) -> None:
    at_t1 = tmp_path / "snapshot.img"
    at_t1.write_bytes(volume("1", "2", "3b", "4b", "5", "6a"))
    primary = tmp_path / "primary.img"
    primary.write_bytes(volume("1b", "lost", "3c", "4c", "lost", "6b"))
    with dr.OverwriteMap.create(tmp_path / "over.map", LOCATIONS * BLOCK, BLOCK) as overwrite:
        for location in (1, 3, 4, 6):
            overwrite.mark_current((location - 1) * BLOCK, BLOCK)
        assert overwrite.to_numpy().tolist() == [True, False, True, True, False, True]
        medium = dr.Bundle.create(at_t1, tmp_path / "medium.drb")
        report = dr.merge(medium, primary, overwrite)
        assert (report.bytes_written, report.bytes_skipped) == (2 * BLOCK, 4 * BLOCK)
        assert overwrite.missing_bytes == 0
        again = dr.merge(medium, primary, overwrite)
        assert again.bytes_written == 0
    assert primary.read_bytes() == volume("1b", "2", "3c", "4c", "5", "6b")


@pytest.fixture
def overwrite_map(tmp_path: Path) -> dr.OverwriteMap:
    return dr.OverwriteMap.create(tmp_path / "m", 10 * BLOCK + 512, BLOCK)


def test_a_map_counts_bytes_and_its_last_block_is_short(overwrite_map: dr.OverwriteMap) -> None:
    assert overwrite_map.missing_bytes == overwrite_map.size == 10 * BLOCK + 512
    overwrite_map.mark_current(10 * BLOCK, 512)
    assert overwrite_map.current_bytes == 512
    assert list(overwrite_map.current_extents()) == [dr.Extent(10 * BLOCK, 512)]
    assert list(overwrite_map.missing_extents()) == [dr.Extent(0, 10 * BLOCK)]
    assert overwrite_map.to_numpy().shape == (11,)


@pytest.mark.parametrize("run", [(1, BLOCK), (0, 1), (0, 11 * BLOCK), (2**64 - BLOCK, BLOCK)])
def test_a_range_that_is_no_whole_blocks_of_the_volume_is_refused(
    overwrite_map: dr.OverwriteMap, run: tuple[int, int]
) -> None:
    with pytest.raises(dr.UsageError):
        overwrite_map.mark_current(*run)
    assert overwrite_map.current_bytes == 0


def test_a_map_in_use_is_busy_and_then_keeps_its_marks(overwrite_map: dr.OverwriteMap) -> None:
    overwrite_map.mark_current(0, BLOCK)
    with pytest.raises(dr.BusyError):
        dr.OverwriteMap.open(overwrite_map.path)
    path = overwrite_map.path
    overwrite_map.close()
    overwrite_map.close()
    with dr.OverwriteMap.open(path) as again:
        assert again.is_current(0, BLOCK)
        assert not again.is_current(0, BLOCK + 1)


def test_a_closed_map_is_a_usage_error(overwrite_map: dr.OverwriteMap) -> None:
    overwrite_map.close()
    with pytest.raises(dr.UsageError):
        overwrite_map.mark_current(0, BLOCK)


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"no map" * 4096)
    with pytest.raises((dr.FormatError, dr.IntegrityError, dr.UsageError)):
        dr.OverwriteMap.open(path)
    with pytest.raises(dr.DeviceError, match="absent"):
        dr.OverwriteMap.open(tmp_path / "absent")


def test_progress_may_end_a_merge_and_it_goes_on_when_asked_again(tmp_path: Path) -> None:
    size = 32 << 20
    good, target = tmp_path / "good", tmp_path / "target"
    good.write_bytes(os.urandom(size))
    target.write_bytes(bytes(size))
    bundle = dr.Bundle.create(good, tmp_path / "b.drb")

    def stop(counters: dict[str, int]) -> None:
        raise KeyboardInterrupt

    with dr.OverwriteMap.create(tmp_path / "m", size) as overwrite:
        with pytest.raises(KeyboardInterrupt):
            dr.merge(bundle, target, overwrite, stop)
        seen: list[dict[str, int]] = []
        dr.merge(bundle, target, overwrite, seen.append)
        assert overwrite.missing_bytes == 0
    assert seen[-1]["done_bytes"] == seen[-1]["total_bytes"]
    assert target.read_bytes() == good.read_bytes()


def test_a_damaged_chunk_stays_missing_and_is_counted(tmp_path: Path) -> None:
    size = 8 << 20
    good, target = tmp_path / "good", tmp_path / "target"
    good.write_bytes(os.urandom(size))
    before = os.urandom(size)
    target.write_bytes(before)
    bundle = dr.Bundle.create(good, tmp_path / "b.drb")
    [segment] = [path for path in Path(bundle.path).iterdir() if path.stat().st_size > size]
    with segment.open("r+b") as file:
        file.seek(3 << 20)
        [byte] = file.read(1)
        file.seek(3 << 20)
        file.write(bytes([byte ^ 1]))
    found = bundle.verify()
    assert (found.sound, found.chunks_damaged) == (False, 1)
    with dr.OverwriteMap.create(tmp_path / "m", size) as overwrite:
        report = dr.merge(bundle, target, overwrite)
        assert report.chunks_damaged == 1
        [missing] = overwrite.missing_extents()
    after = target.read_bytes()
    assert after[missing.offset : missing.end] == before[missing.offset : missing.end]
    assert after[: missing.offset] == good.read_bytes()[: missing.offset]
    assert after[missing.end :] == good.read_bytes()[missing.end :]


class MergedVolume(RuleBasedStateMachine):
    """A target file under writes and merges, beside an oracle of bytes and bits."""

    BLOCKS = 40
    blocks = st.integers(0, BLOCKS - 1)
    counts = st.integers(1, 9)

    def __init__(self) -> None:
        super().__init__()
        self._place = tempfile.TemporaryDirectory()
        place = Path(self._place.name)
        size = self.BLOCKS * BLOCK
        self.truth = bytearray(os.urandom(size))
        self.target = place / "target"
        self.target.write_bytes(os.urandom(size))
        self.oracle = bytearray(self.target.read_bytes())
        self.is_current = numpy.zeros(self.BLOCKS, dtype=bool)
        self.map_path = place / "map"
        self.map = dr.OverwriteMap.create(self.map_path, size, BLOCK)
        self.media: list[dr.Bundle | Path] = []
        self._numbers = iter(range(10_000))

    def _run(self, block: int, count: int) -> tuple[int, int, int]:
        end = min(block + count, self.BLOCKS)
        return block, end, (end - block) * BLOCK

    @rule(block=blocks, count=counts)
    def an_application_writes(self, block: int, count: int) -> None:
        first, end, length = self._run(block, count)
        data = os.urandom(length)
        with self.target.open("r+b") as file:
            file.seek(first * BLOCK)
            file.write(data)
        changed = self.map.mark_current(first * BLOCK, length)
        assert changed == int((~self.is_current[first:end]).sum()) * BLOCK
        self.is_current[first:end] = True
        self.oracle[first * BLOCK : end * BLOCK] = data

    @rule(block=blocks, count=counts, compression=st.sampled_from(["none", "zstd"]))
    def a_bundle_of_a_part_is_made(self, block: int, count: int, compression: str) -> None:
        first, _, length = self._run(block, count)
        number = next(self._numbers)
        image = Path(self._place.name) / f"{number}.img"
        image.write_bytes(self.truth)
        self.media.append(
            dr.Bundle.create(
                image,
                Path(self._place.name) / f"{number}.drb",
                [(first * BLOCK, length)],
                compression="zstd" if compression == "zstd" else "none",
            )
        )

    @rule()
    def a_raw_image_arrives(self) -> None:
        image = Path(self._place.name) / f"{next(self._numbers)}.raw"
        image.write_bytes(self.truth)
        self.media.append(image)

    @precondition(lambda self: self.media)
    @rule(choice=st.integers(0, 99))
    def a_medium_is_merged(self, choice: int) -> None:
        medium = self.media[choice % len(self.media)]
        selected = numpy.ones(self.BLOCKS, dtype=bool)
        if isinstance(medium, dr.Bundle):
            selected[:] = False
            for offset, length in medium.show()["extents"]:
                selected[offset // BLOCK : (offset + length) // BLOCK] = True
        report = dr.merge(medium, self.target, self.map)
        written = selected & ~self.is_current
        assert report.bytes_written == int(written.sum()) * BLOCK
        assert report.bytes_skipped == int((selected & self.is_current).sum()) * BLOCK
        for block in numpy.flatnonzero(written):
            part = slice(int(block) * BLOCK, (int(block) + 1) * BLOCK)
            self.oracle[part] = self.truth[part]
        self.is_current |= written

    @rule()
    def the_map_is_opened_again(self) -> None:
        self.map.close()
        self.map = dr.OverwriteMap.open(self.map_path)

    @invariant()
    def the_map_says_what_is_current(self) -> None:
        assert (self.map.to_numpy() == self.is_current).all()
        assert self.map.current_bytes == int(self.is_current.sum()) * BLOCK
        assert sum(self.map.picture(7)) == self.map.current_bytes

    @invariant()
    def nothing_but_missing_blocks_was_overwritten(self) -> None:
        assert self.target.read_bytes() == self.oracle

    def teardown(self) -> None:
        self.map.close()
        self._place.cleanup()


TestMergedVolume = MergedVolume.TestCase
TestMergedVolume.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
