"""A live pair under any order of events, against a model of a few lines (law 1 to law 7).

What is modelled: what an application reads, which snapshot holds what, which bundle fits which
life. Crashes are the affair of `tests/primary` (any step) and `tests/e2e` (real processes).
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from dualrestore.core import Bundle
from dualrestore.errors import IdentityError
from tests.python.live_pair import LivePair

BLOCK = 4096
SECTOR = 512
BLOCKS = 12
SIZE = BLOCKS * BLOCK + SECTOR
"""The last block is short."""

blocks = st.integers(0, BLOCKS)
fills = st.integers(1, 255)
counts = st.integers(1, 4)


@dataclass
class Medium:
    """A bundle on its way."""

    path: Path
    generation: int


class LiveVolume(RuleBasedStateMachine):
    """One volume on two sides."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="dr-live-"))
        self.pair = LivePair(self.place, SIZE)
        self.held = bytearray(SIZE)
        self.snapshots: dict[str, bytes] = {}
        self.media: list[Medium] = []
        self.is_cut = False

    @initialize(fill=fills)
    def something_is_there(self, fill: int) -> None:
        content = b"".join(bytes([fill, block]) * (BLOCK // 2) for block in range(BLOCKS + 1))
        self._write(0, content[:SIZE])
        self.pair.wait_mirrored()

    def _span(self, block: int, count: int) -> tuple[int, int]:
        begin = block * BLOCK
        return begin, min(begin + count * BLOCK, SIZE) - begin

    def _is_missing(self, offset: int, length: int) -> bool:
        missing = self.pair.primary.map_extents("missing")
        return any(begin < offset + length and offset < begin + size for begin, size in missing)

    def _write(self, offset: int, content: bytes) -> None:
        self.pair.client.write(offset, content)
        self.held[offset : offset + len(content)] = content

    @rule(block=blocks, count=counts, fill=fills)
    def whole_blocks_are_written(self, block: int, count: int, fill: int) -> None:
        offset, length = self._span(block, count)
        self._write(offset, bytes([fill]) * length)

    @rule(sector=st.integers(0, SIZE // SECTOR - 1), fill=fills)
    def a_sector_is_written(self, sector: int, fill: int) -> None:
        offset = sector * SECTOR
        block, length = self._span(offset // BLOCK, 1)
        if self.is_cut and self._is_missing(block, length) and length > SECTOR:
            with pytest.raises(OSError, match="error"):
                self.pair.client.write(offset, bytes([fill]) * SECTOR)
        else:
            self._write(offset, bytes([fill]) * SECTOR)

    @rule(block=blocks, count=counts, trims=st.booleans())
    def blocks_are_zeroed(self, block: int, count: int, *, trims: bool) -> None:
        offset, length = self._span(block, count)
        zero = self.pair.client.trim if trims else self.pair.client.write_zeroes
        zero(offset, length)
        self.held[offset : offset + length] = bytes(length)

    @rule(block=blocks, count=counts)
    def blocks_are_read(self, block: int, count: int) -> None:
        offset, length = self._span(block, count)
        if self.is_cut and self._is_missing(offset, length):
            with pytest.raises(OSError, match="error"):
                self.pair.client.read(offset, length)
        else:
            assert self.pair.client.read(offset, length) == self.held[offset : offset + length]

    @rule()
    def it_is_flushed(self) -> None:
        self.pair.client.flush()

    @precondition(lambda self: not self.is_cut)
    @rule(block=blocks, count=st.integers(1, BLOCKS + 1))
    def blocks_are_lost(self, block: int, count: int) -> None:
        # What the backup never got would be lost with them.
        self.pair.client.flush()
        offset, length = self._span(block, count)
        self.pair.restore("all" if length == SIZE else [(offset, length)])
        with self.pair.primary_device.open("r+b") as device:
            device.seek(offset)
            device.write(b"\xdd" * length)

    @precondition(lambda self: not self.is_cut)
    @rule()
    def a_snapshot_is_cut(self) -> None:
        self.snapshots[self.pair.snapshot()] = bytes(self.held)

    @precondition(lambda self: bool(self.snapshots))
    @rule(choice=st.integers(0, 99), compressed=st.booleans())
    def a_bundle_is_made(self, choice: int, *, compressed: bool) -> None:
        snapshot = sorted(self.snapshots)[choice % len(self.snapshots)]
        path = self.place / f"medium-{len(self.media)}"
        bundle = Bundle.create(
            self.pair.backup.source(snapshot), path, compression="zstd" if compressed else "none"
        )
        assert bundle.report is not None
        self.media.append(Medium(path, bundle.report.generation))

    def _merge_of_before(self, medium: Medium) -> None:
        """Law 7: of an earlier generation only what the backup vouches for, nothing without it."""
        before = self.pair.status()["missing_bytes"]
        if self.is_cut:
            with pytest.raises(IdentityError):
                self.pair.merge(medium.path)
            assert self.pair.status()["missing_bytes"] == before
            return
        report = self.pair.merge(medium.path)
        told = report.bytes_written + report.bytes_fetched
        assert self.pair.status()["missing_bytes"] == before - told
        assert told + report.bytes_stale + report.bytes_in_doubt == before
        assert self.pair.client.read(0, SIZE) == self.held

    @precondition(lambda self: bool(self.media))
    @rule(choice=st.integers(0, 99))
    def a_medium_is_merged(self, choice: int) -> None:
        medium = self.media[choice % len(self.media)]
        if medium.generation != self.pair.status()["generation"]:
            self._merge_of_before(medium)
            return
        missing = self.pair.status()["missing_bytes"]
        report = self.pair.merge(medium.path)
        assert report.bytes_written + report.bytes_fetched == missing
        assert self.pair.status()["missing_bytes"] == 0
        assert self.pair.merge(medium.path).bytes_written == 0

    @precondition(lambda self: bool(self.snapshots))
    @rule(choice=st.integers(0, 99))
    def a_snapshot_is_read(self, choice: int) -> None:
        snapshot = sorted(self.snapshots)[choice % len(self.snapshots)]
        assert self.pair.read_snapshot(snapshot) == self.snapshots[snapshot]

    @precondition(lambda self: bool(self.snapshots))
    @rule(choice=st.integers(0, 99))
    def a_snapshot_is_deleted(self, choice: int) -> None:
        snapshot = sorted(self.snapshots)[choice % len(self.snapshots)]
        self.pair.backup.delete_snapshot(snapshot)
        del self.snapshots[snapshot]

    @rule()
    def the_wire_is_cut_or_mended(self) -> None:
        if self.is_cut:
            self.pair.mend()
        else:
            self.pair.cut()
        self.is_cut = not self.is_cut

    @rule()
    def the_primary_is_opened_again(self) -> None:
        self.pair.reopen_primary()
        if not self.is_cut:
            self.pair.mend()

    @rule()
    def the_backup_is_opened_again(self) -> None:
        self.pair.reopen_backup()
        if not self.is_cut:
            self.pair.mend()

    def teardown(self) -> None:
        """All of it comes together in the end."""
        try:
            if self.is_cut:
                self.pair.mend()
            self.pair.primary.hydrate(True)
            self.pair.wait_mirrored()
            assert self.pair.client.read(0, SIZE) == self.held
            for snapshot, content in self.snapshots.items():
                assert self.pair.read_snapshot(snapshot) == content
        finally:
            self.pair.close()
        held = [path.read_bytes() for path in (self.pair.primary_device, self.pair.mirror_device)]
        assert held == [self.held, self.held]
        shutil.rmtree(self.place)


TestLiveVolume = LiveVolume.TestCase
# No shrinking: a run takes seconds, and the list of its events is short.
TestLiveVolume.settings = settings(
    max_examples=10,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
