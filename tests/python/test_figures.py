"""Figures 3A and 3B of the method's description, step by step, against the Python API: paragraphs
46 to 62, with the maps and both storages after every step."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dualrestore.core import Bundle
from tests.python.live_pair import LivePair, wait_until

BLOCK = 4096
LOCATIONS = range(1, 7)


def content(label: str) -> bytes:
    """The content of a block that the figure names `label`, such as 3b."""
    return label.encode().ljust(8) * (BLOCK // 8)


def labels(six: bytes) -> str:
    """The names of six blocks."""
    names = [six[at * BLOCK :][:8].decode().strip() for at in range(6)]
    assert six == b"".join(content(name) for name in names)
    return " ".join(names)


class Figure:
    """What the figure shows: map 370, storages 112 and 122, snapshot storage 300."""

    def __init__(self, pair: LivePair) -> None:
        self.pair = pair

    def write(self, *names: str) -> None:
        """Each to the location that it begins with."""
        for name in names:
            self.pair.client.write((int(name[0]) - 1) * BLOCK, content(name))
        self.pair.client.flush()

    def read(self, location: int) -> str:
        """The name of what a location holds."""
        block = self.pair.client.read((location - 1) * BLOCK, BLOCK)
        name = block[:8].decode().strip()
        assert block == content(name)
        return name

    def overwrite_map(self) -> str:
        """Grey locations as 1."""
        current = self.pair.primary.map_extents("current")
        grey = {(offset + at) // BLOCK for offset, length in current for at in range(length)}
        return "".join("1" if location - 1 in grey else "0" for location in LOCATIONS)

    def primary(self) -> str:
        """What the primary's storage holds where the map says that it is current."""
        held = self.pair.primary_device.read_bytes()
        grey = self.overwrite_map()
        names = []
        for at in range(6):
            block = held[at * BLOCK : (at + 1) * BLOCK]
            names.append(block[:8].decode().strip() if grey[at] == "1" else "-")
            assert grey[at] == "0" or block == content(names[-1])
        return " ".join(names)

    def backup(self) -> str:
        """What the backup's storage holds."""
        return labels(self.pair.mirror_device.read_bytes())

    def preserved(self, snapshot: str) -> int:
        """Blocks in the snapshot storage."""
        (found,) = [one for one in self.pair.backup.snapshots() if one["snapshot"] == snapshot]
        return int(found["preserved_bytes"]) // BLOCK


@pytest.fixture
def figure(tmp_path: Path) -> Iterator[Figure]:
    """T0: blocks 1 to 6 at the backup, none at the primary."""
    pair = LivePair(tmp_path, 6 * BLOCK)
    try:
        drawn = Figure(pair)
        drawn.write("1", "2", "3", "4", "5", "6")
        pair.wait_mirrored()
        pair.restore("all")
        pair.primary_device.write_bytes(b"\xdd" * 6 * BLOCK)
        yield drawn
    finally:
        pair.close()


def test_figures_3a_and_3b_step_by_step(figure: Figure, tmp_path: Path) -> None:
    pair = figure.pair
    t0 = pair.snapshot()
    assert (figure.overwrite_map(), figure.primary()) == ("000000", "- - - - - -")
    # Read request 347 is answered by data block 348.
    assert figure.read(1) == "1"
    # A reader is answered before what was fetched is written.
    wait_until("the fetched block is kept", lambda: figure.overwrite_map() == "100000")
    assert (figure.overwrite_map(), figure.primary()) == ("100000", "1 - - - - -")
    # Data blocks 340.
    figure.write("3a", "4a")
    assert (figure.overwrite_map(), figure.primary()) == ("101100", "1 - 3a 4a - -")
    assert figure.backup() == "1 2 3a 4a 5 6"
    # Data blocks 342.
    figure.write("3b", "4b", "6a")
    assert (figure.overwrite_map(), figure.primary()) == ("101101", "1 - 3b 4b - 6a")
    assert figure.backup() == "1 2 3b 4b 5 6a"
    assert figure.preserved(t0) == 3, "the old 3, 4 and 6: map 316"
    # T1: the snapshot.
    t1 = pair.snapshot()
    assert figure.preserved(t1) == 0
    # Data blocks 344: copy-before-write of 1 and 3, map 317.
    figure.write("1a", "3c")
    assert (figure.overwrite_map(), figure.primary()) == ("101101", "1a - 3c 4b - 6a")
    assert figure.backup() == "1a 2 3c 4b 5 6a"
    assert figure.preserved(t1) == 2
    # The transportation medium 128, made of 336, 317 and 300.
    medium = tmp_path / "medium"
    Bundle.create(pair.backup.source(t1), medium)
    # Data blocks 346: 4b and 6a are preserved, 1a is not, map 318.
    figure.write("1b", "4c", "6b")
    assert (figure.overwrite_map(), figure.primary()) == ("101101", "1b - 3c 4c - 6b")
    assert figure.backup() == "1b 2 3c 4c 5 6b"
    assert figure.preserved(t1) == 4
    assert labels(pair.read_snapshot(t1)) == "1 2 3b 4b 5 6a"
    assert labels(pair.read_snapshot(t0)) == "1 2 3 4 5 6"
    # T2: the medium has arrived; only 2 and 5 are written.
    report = pair.merge(medium)
    assert (report.bytes_written, report.bytes_skipped) == (2 * BLOCK, 4 * BLOCK)
    assert (figure.overwrite_map(), figure.primary()) == ("111111", "1b 2 3c 4c 5 6b")
    pair.wait_mirrored()
    assert figure.backup() == figure.primary() == "1b 2 3c 4c 5 6b"
    assert pair.merge(medium).bytes_written == 0
