"""Figures 3A and 3B, step by step, against two running daemons and their NBD exports."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import Pair, run, wait_until
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 4096
LOCATIONS = range(1, 7)


def content(label: str) -> bytes:
    """The content of a block that the figure names `label`, such as 3b."""
    return label.encode().ljust(8) * (BLOCK // 8)


def label(block: bytes) -> str:
    """The name of a block's content; fails unless the whole block holds it."""
    name = block[:8].decode().strip()
    assert block == content(name), f"a mixture that begins with {name!r}"
    return name


def write(client: NbdClient, *labels: str) -> None:
    """Writes each label to the location it begins with, and flushes."""
    for name in labels:
        client.write((int(name[0]) - 1) * BLOCK, content(name))
    client.flush()


def labels_of(content_of_six: bytes) -> list[str]:
    """The names of six blocks."""
    return [label(content_of_six[(at - 1) * BLOCK : at * BLOCK]) for at in LOCATIONS]


def marked(uri: str, context: str) -> set[int]:
    """The locations that a dirty-bitmap context of the export marks."""
    printed = run(["nbdinfo", "--json", f"--map={context}", uri]).stdout
    found: set[int] = set()
    for extent in json.loads(printed):
        if extent["type"] & 1:
            first, length = extent["offset"] // BLOCK, extent["length"] // BLOCK
            found.update(range(first + 1, first + length + 1))
    return found


def current(pair: Pair) -> set[int]:
    """The grey locations of the overwrite map."""
    return set(LOCATIONS) - marked(pair.uri, "qemu:dirty-bitmap:missing")


def mirror(pair: Pair) -> list[str]:
    """What the backup's storage holds."""
    return labels_of(pair.mirror_device.read_bytes())


def preserved_bytes(pair: Pair, snapshot: str) -> int:
    """Bytes in the preservation store of the snapshot."""
    snapshots = pair.backup.status()["snapshots"]
    (found,) = [entry for entry in snapshots if entry["snapshot"] == snapshot]
    return int(found["preserved_bytes"])


def snapshot_view(pair: Pair, snapshot: str) -> list[str]:
    """The volume as it was at the cut."""
    with NbdClient(pair.backup_socket, f"v@{snapshot}") as client:
        return labels_of(client.read(0, 6 * BLOCK))


@pytest.fixture
def lost() -> Iterator[Pair]:
    """T0: six blocks 1 to 6 at the backup, none at the primary."""
    with Pair(6 * BLOCK) as pair:
        with NbdClient(pair.socket, "v") as client:
            write(client, "1", "2", "3", "4", "5", "6")
        pair.lose_disk()
        yield pair


def test_figures_3a_and_3b_step_by_step(lost: Pair) -> None:
    at_t0 = lost.snapshot()
    assert current(lost) == set()
    with NbdClient(lost.socket, "v") as client:
        figure_3a(lost, client)
        medium, snapshot = figure_3b(lost, client, at_t0)
        # T2: the medium has arrived.
        report = lost.merge(medium)
        assert report["bytes_written"] + report["bytes_zeroed"] == 2 * BLOCK, "2 and 5 only"
        assert report["bytes_skipped"] == 4 * BLOCK
        assert current(lost) == set(LOCATIONS)
        assert labels_of(client.read(0, 6 * BLOCK)) == ["1b", "2", "3c", "4c", "5", "6b"]
        assert snapshot_view(lost, snapshot) == ["1", "2", "3b", "4b", "5", "6a"]
    lost.wait_mirrored()
    assert mirror(lost) == ["1b", "2", "3c", "4c", "5", "6b"]
    assert lost.merge(medium)["bytes_written"] == 0, "a second merge writes nothing"
    lost.stop_and_compare()


def figure_3a(pair: Pair, client: NbdClient) -> None:
    """From the loss to the snapshot: one read, two requests of writes."""
    assert label(client.read(0, BLOCK)) == "1"
    # A reader is answered before what was fetched is written.
    wait_until("the fetched block is kept", lambda: current(pair) == {1})
    write(client, "3a", "4a")
    assert current(pair) == {1, 3, 4}
    assert mirror(pair) == ["1", "2", "3a", "4a", "5", "6"]
    write(client, "3b", "4b", "6a")
    assert current(pair) == {1, 3, 4, 6}
    assert mirror(pair) == ["1", "2", "3b", "4b", "5", "6a"]


def figure_3b(pair: Pair, client: NbdClient, at_t0: str) -> tuple[Path, str]:
    """From the snapshot to the medium: copy-before-write of 1 and 3, then of 4 and 6."""
    snapshot = pair.snapshot()
    uri = pair.snapshot_uri(snapshot)
    assert marked(uri, "qemu:dirty-bitmap:changed") == {3, 4, 6}, "changed from T0 to T1"
    assert preserved_bytes(pair, snapshot) == 0
    write(client, "1a", "3c")
    assert current(pair) == {1, 3, 4, 6}
    assert mirror(pair) == ["1a", "2", "3c", "4b", "5", "6a"]
    assert preserved_bytes(pair, snapshot) == 2 * BLOCK, "the old 1 and 3b"
    assert snapshot_view(pair, snapshot) == ["1", "2", "3b", "4b", "5", "6a"]
    medium = pair.bundle(snapshot)
    write(client, "1b", "4c", "6b")
    assert current(pair) == {1, 3, 4, 6}
    assert mirror(pair) == ["1b", "2", "3c", "4c", "5", "6b"]
    assert preserved_bytes(pair, snapshot) == 4 * BLOCK, "and 4b and 6a, but not 1a"
    assert snapshot_view(pair, snapshot) == ["1", "2", "3b", "4b", "5", "6a"]
    assert snapshot_view(pair, at_t0) == ["1", "2", "3", "4", "5", "6"]
    return medium, snapshot
