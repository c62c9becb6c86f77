"""Devices that may not be written to, and places with no room, on either side.

Guarantees: nothing is mounted for others, nothing stays attached. Does not know: files and words
(`tests/python/test_bad_input_files.py`), daemons (`test_bad_input_daemons.py`).
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, PROGRAM, Pair, garbage, run, wait_until
from tests.e2e.nbd_client import NbdClient
from tests.refusal import BUSY, FAILED, NOT_OURS, USAGE, Ended, refused

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = pytest.mark.root
SIZE = 4 * MIB


def ask(words: Sequence[object]) -> Ended:
    """Runs a verb."""
    told = run([PROGRAM, *map(str, words)], expect=None)
    return Ended(told.returncode, told.stdout, told.stderr)


@contextmanager
def loop(backing: Path, *options: str) -> Iterator[Path]:
    """A block device of that file."""
    attached = run(["losetup", "-f", "--show", *options, backing]).stdout.strip()
    try:
        yield Path(attached)
    finally:
        run(["losetup", "-d", attached])


@contextmanager
def mounted(what: Path | str, top: Path, *options: str) -> Iterator[Path]:
    """A file system, for this process and its children only."""
    top.mkdir(exist_ok=True)
    run(["mount", *options, what, top])
    try:
        yield top
    finally:
        run(["umount", "-l", top])


@contextmanager
def room(kind: str, top: Path, bytes_free: int) -> Iterator[Path]:
    """A small file system of a kind."""
    if kind == "tmpfs":
        with mounted("none", top, "-t", "tmpfs", "-o", f"size={bytes_free}"):
            yield top
        return
    backing = top.with_suffix(".ext4")
    backing.touch()
    os.truncate(backing, bytes_free)
    run(["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", backing])
    with mounted(backing, top, "-o", "loop"):
        yield top


def fill(top: Path) -> Path:
    """Takes all the room there is."""
    filler = top / "filler"
    run(["dd", "if=/dev/zero", f"of={filler}", "bs=64k"], expect=None)
    run(
        ["dd", "if=/dev/zero", f"of={filler}", "bs=512", "oflag=append", "conv=notrunc"],
        expect=None,
    )
    assert filler.stat().st_size
    return filler


class Work:
    """A bundle and a map that fit targets of SIZE bytes."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.good, self.bundle, self.map = top / "good.img", top / "bundle", top / "over.map"
        garbage(self.good, SIZE)
        assert ask(["bundle", "create", self.good, "--to", self.bundle]).code == 0
        assert ask(["map", "create", self.map, "--size", SIZE]).code == 0

    def merge_refused(self, target: Path, *says: str, code: int, kind: str) -> None:
        """The merge into the device is refused."""
        places = [self.map, self.bundle, self.top / "disk"]
        words = ["merge", self.bundle, target, "--map", self.map]
        refused(ask, words, code=code, kind=kind, says=[str(target), *says], untouched=places)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Fresh files, and a file `disk` to attach."""
    (tmp_path / "disk").write_bytes(b"\xee" * SIZE)
    return Work(tmp_path)


BACKUP = """[node]
state = "{top}/state"
control = "{top}/control.sock"
listen = "127.0.0.1:10811"
[volume.v]
role = "backup"
device = "{device}"
"""


def serve_refused(work: Work, device: Path, *says: str, code: int, kind: str) -> None:
    """A daemon with that device does not start, and leaves nothing behind."""
    path = work.top / "backup.toml"
    path.write_text(BACKUP.format(top=work.top, device=device))
    words = ["serve", "-c", path]
    places = [work.top / "disk", work.top / "state", work.top / "control.sock"]
    refused(ask, words, code=code, kind=kind, says=[str(device), *says], untouched=places)


def test_a_mounted_device_is_refused(work: Work) -> None:
    run(["mkfs.ext4", "-q", "-F", work.top / "disk"])
    with loop(work.top / "disk") as device, mounted(device, work.top / "mounted", "-o", "ro"):
        says = ("mounted at", "unmount it first")
        work.merge_refused(device, *says, code=BUSY, kind="BusyError")
        serve_refused(work, device, *says, code=BUSY, kind="BusyError")


def test_a_device_that_another_program_holds_is_refused(work: Work) -> None:
    with loop(work.top / "disk") as device:
        held = os.open(device, os.O_RDWR | os.O_EXCL)
        try:
            says = ("in use", "release it first")
            work.merge_refused(device, *says, code=BUSY, kind="BusyError")
            serve_refused(work, device, *says, code=BUSY, kind="BusyError")
        finally:
            os.close(held)


def test_a_read_only_device_is_refused(work: Work) -> None:
    with loop(work.top / "disk", "-r") as device:
        says = ("the device is read-only", "make it writable", "choose another")
        work.merge_refused(device, *says, code=FAILED, kind="DeviceError")
        serve_refused(work, device, *says, code=FAILED, kind="DeviceError")


def test_a_device_that_is_too_small_is_refused(work: Work) -> None:
    os.truncate(work.top / "disk", SIZE // 2)
    with loop(work.top / "disk") as device:
        says = (f"expected a target of at least the {SIZE} bytes", f"found {SIZE // 2}")
        work.merge_refused(device, *says, code=NOT_OURS, kind="IdentityError")


def test_blocks_that_are_no_whole_sectors_of_a_device_are_refused(work: Work) -> None:
    work.map.unlink()
    words = ["map", "create", work.map, "--size", SIZE, "--block-size", "512"]
    assert ask(words).code == 0
    with loop(work.top / "disk", "-b", "4096") as device:
        says = ("blocks of 512 bytes", "found sectors of 4096", "larger blocks")
        work.merge_refused(device, *says, code=NOT_OURS, kind="IdentityError")
        path = work.top / "backup.toml"
        text = BACKUP.format(top=work.top, device=device) + "block_size = 512\n"
        path.write_text(text)
        refused(
            ask,
            ["serve", "-c", path],
            code=USAGE,
            kind="UsageError",
            says=[str(device), "sectors of 4096 bytes", "and 512", "mend size and block_size"],
            untouched=[work.top / "disk", work.top / "state"],
        )


def test_a_read_only_file_system_is_refused(work: Work) -> None:
    with mounted("none", work.top / "place", "-t", "tmpfs") as place:
        for name in ("good.img", "over.map"):
            run(["cp", work.top / name, place])
        run(["mount", "-o", "remount,ro", place])
        says = ("Read-only file system", "make it writable (remount), or name another place")
        for words in (
            ["merge", work.bundle, place / "good.img", "--map", work.map],
            ["map", "mark", place / "over.map", "0-4KiB"],
            ["map", "create", place / "new.map", "--size", "1MiB"],
            ["bundle", "create", work.good, "--to", place / "new"],
        ):
            refused(
                ask,
                words,
                code=FAILED,
                kind="DeviceError",
                says=[str(place), *says],
                untouched=[work.top],
            )


NO_MEDIUM = ("found no room for it", "take a larger one")
NO_SPACE = ("No space left on device", "make room there")


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_place_with_no_room_is_refused_and_nothing_is_left_there(work: Work, kind: str) -> None:
    with room(kind, work.top / "place", MIB) as place:
        fill(place)
        # Where not even a directory can be made, that is said.
        of_bundles = NO_MEDIUM if kind == "tmpfs" else NO_SPACE
        for words, says in (
            (["bundle", "create", work.good, "--to", place / "new"], of_bundles),
            (["map", "create", place / "new.map", "--size", "1GiB"], NO_SPACE),
        ):
            refused(
                ask,
                words,
                code=FAILED,
                kind="DeviceError",
                says=[str(place), *says],
                untouched=[place, work.good],
            )


def test_a_bundle_that_does_not_fit_its_medium_is_taken_back(work: Work) -> None:
    with room("ext4", work.top / "place", MIB) as place:
        refused(
            ask,
            ["bundle", "create", work.good, "--to", place / "new"],
            code=FAILED,
            kind="DeviceError",
            says=[str(place), *NO_MEDIUM],
            untouched=[place, work.good],
        )


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_target_with_no_room_keeps_what_fits_and_takes_the_rest_later(
    work: Work, kind: str
) -> None:
    with room(kind, work.top / "place", 8 * MIB) as place:
        target = place / "target.img"
        target.touch()
        os.truncate(target, SIZE)
        filler = fill(place)
        words = ["merge", work.bundle, target, "--map", work.map]
        failed = ask([*words, "--json"])
        error = json.loads(failed.err)["error"]
        assert (failed.code, error["kind"]) == (FAILED, "DeviceError")
        assert json.loads(failed.out)["bytes_written"] < SIZE, (
            "what was merged is told all the same"
        )
        assert "target.img: write: No space left on device" in error["message"]
        assert "make room there" in error["message"]
        # What the map calls current is there; the rest is as it was.
        shown = json.loads(ask(["map", "export", work.map, "--json"]).out)
        good, held = work.good.read_bytes(), target.read_bytes()
        for offset, length in shown["current"]:
            assert held[offset : offset + length] == good[offset : offset + length]
        filler.unlink()
        finished = ask([*words, "--json"])
        assert finished.code == 0, finished.err
        assert target.read_bytes() == good


# Daemons.


@contextmanager
def small(pair: Pair, top: Path, bytes_free: int) -> Iterator[Path]:
    """A small file system in the place of a pair, which is cleared away after it."""
    try:
        with room("tmpfs", top, bytes_free):
            yield top
    finally:
        pair.close()


@contextmanager
def cramped(pair: Pair, device: Path, bytes_free: int) -> Iterator[Path]:
    """The device of one side lies, sparse, where there is less room than it may need."""
    with mounted(
        "none", pair.directory / "place", "-t", "tmpfs", "-o", f"size={bytes_free}"
    ) as top:
        (top / "image").touch()
        os.truncate(top / "image", pair.size)
        device.symlink_to(top / "image")
        with pair:
            pair.primary.verb("restore", "v", "--lost", "none")
            pair.wait_mirrored()
            yield top


def enlarge(top: Path) -> None:
    """Makes room."""
    run(["mount", "-o", "remount,size=64m", top])


def test_a_full_disk_of_the_primary_fails_the_write_and_nothing_else() -> None:
    pair = Pair(8 * MIB)
    with cramped(pair, pair.primary_device, 4 * MIB) as top:
        with NbdClient(pair.socket, "v") as client:
            client.write(0, b"\x61" * (3 * MIB))
            with pytest.raises(OSError, match="answered with an error"):
                client.write(4 * MIB, b"\x62" * (2 * MIB))
            assert client.read(0, 3 * MIB) == b"\x61" * (3 * MIB)
            client.write(MIB, b"\x63" * MIB)
            client.flush()
            assert pair.primary.status()["error"] is None
            enlarge(top)
            client.write(4 * MIB, b"\x62" * (2 * MIB))
            client.flush()
        pair.wait_mirrored()
        pair.primary.verb("verify", "v")


def test_a_full_disk_of_the_backup_is_told_and_caught_up_with_once_there_is_room() -> None:
    pair = Pair(8 * MIB)
    with cramped(pair, pair.mirror_device, 4 * MIB) as top:
        with NbdClient(pair.socket, "v") as client:
            client.write(0, b"\x61" * (3 * MIB))
            client.write(4 * MIB, b"\x62" * (3 * MIB))
            client.flush()
            assert client.read(4 * MIB, 3 * MIB) == b"\x62" * (3 * MIB)
        status = pair.primary.status()
        assert (status["state"], status["mirrored"], status["error"]) == ("degraded", False, None)
        for told in (status["backups"][0]["error"], pair.backup.status()["error"]):
            assert "mirror.img: write: No space left on device" in told
            assert "make room there" in told
        enlarge(top)
        pair.backup.kill()
        pair.backup.start()
        pair.wait_mirrored()
        pair.primary.verb("verify", "v")


def test_no_room_for_a_map_stops_writes_in_words_and_loses_nothing() -> None:
    # Three pages of the map: the last needs room that is not there.
    pair = Pair(256 * MIB)
    state = pair.directory / "primary-state"
    with small(pair, state, MIB), pair:
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        filler = fill(state)
        with NbdClient(pair.socket, "v") as client:
            client.write(255 * MIB, b"\x61" * MIB)
            client.flush()
            wait_until("it is told", lambda: pair.primary.status()["state"] == "failed")
            error = pair.primary.status()["error"]
            assert "overwrite.map: write: No space left on device" in error
            assert "restart" in error
            with pytest.raises(OSError, match="answered with an error"):
                client.write(16 * MIB, b"\x62" * MIB)
            assert client.read(255 * MIB, MIB) == b"\x61" * MIB
        pair.primary.kill()
        filler.unlink()
        pair.primary.start()
        pair.wait_mirrored()
        with NbdClient(pair.socket, "v") as client:
            assert client.read(255 * MIB, MIB) == b"\x61" * MIB
            client.write(16 * MIB, b"\x62" * MIB)
            client.flush()
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_no_room_for_a_snapshot_refuses_the_cut_and_mirroring_goes_on() -> None:
    pair = Pair(64 * MIB)
    state = pair.directory / "backup-state"
    with small(pair, state, MIB), pair:
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 1M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        fill(state)
        refused(
            lambda words: ask(["-c", pair.primary.configuration, *words]),
            ["snapshot", "v"],
            code=FAILED,
            kind="DeviceError",
            says=["backup", "No space left on device", "make room there"],
            untouched=[pair.mirror_device, state],
        )
        run(["qemu-io", "-f", "raw", "-c", "write -P 8 0 1M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_full_preservation_store_breaks_the_snapshot_in_words_and_never_the_writes() -> None:
    pair = Pair(16 * MIB)
    state = pair.directory / "backup-state"
    with small(pair, state, 8 * MIB), pair:
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 16M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        snapshot = pair.snapshot()
        run(["qemu-io", "-f", "raw", "-c", "write -P 8 0 12M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        to = pair.directory / "never"
        refused(
            lambda words: ask(["-c", pair.backup.configuration, *words]),
            ["bundle", "create", f"v@{snapshot}", "--to", to],
            code=NOT_OURS,
            kind="IntegrityError",
            says=["is broken", "preservation store is full", "take a new snapshot"],
            untouched=[pair.mirror_device, to],
        )
        pair.stop_and_compare()


def test_a_bundle_of_a_snapshot_that_does_not_fit_its_medium_is_taken_back() -> None:
    with Pair(SIZE) as pair:
        garbage(pair.directory / "content", SIZE)
        run(["nbdcopy", pair.directory / "content", pair.uri])
        pair.wait_mirrored()
        snapshot = pair.snapshot()
        place = pair.directory / "place"
        with mounted("none", place, "-t", "tmpfs", "-o", "size=1m"):
            # The daemon has its own view of the mounts of the time when it began.
            pair.backup.stop()
            pair.backup.start()
            refused(
                lambda words: ask(["-c", pair.backup.configuration, *words]),
                ["bundle", "create", f"v@{snapshot}", "--to", place / "new"],
                code=FAILED,
                kind="DeviceError",
                says=[str(place), *NO_MEDIUM],
                untouched=[place, pair.mirror_device],
            )
