"""Bad words, bundles, addresses and state, as they meet daemons: refused, and nothing is touched.

Does not know: files without a daemon (`tests/python/test_bad_input_files.py`), block devices and
full disks (`test_bad_input_disks.py`).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.e2e.harness import MIB, PROGRAM, Daemon, Pair, free_port, garbage, run, wait_until
from tests.e2e.pki import set_tls, write_pki
from tests.golden.link_v1 import crc32c
from tests.refusal import BUSY, FAILED, LINK_DOWN, NOT_OURS, USAGE, Ended, refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SIZE = 4 * MIB
SLOT = 4096
UNKNOWN = "11111111-2222-4333-8444-555555555555"


def asking(daemon: Daemon) -> Callable[[Sequence[object]], Ended]:
    """Runs verbs with the configuration of this daemon."""

    def ask(words: Sequence[object]) -> Ended:
        told = run([PROGRAM, "-c", daemon.configuration, *map(str, words)], expect=None, seconds=60)
        return Ended(told.returncode, told.stdout, told.stderr)

    return ask


class Served:
    """A pair with content, and bundles that may not be merged into it."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        garbage(pair.directory / "content", SIZE)
        run(["nbdcopy", pair.directory / "content", pair.uri])
        pair.wait_mirrored()
        self.snapshot = pair.snapshot()
        self.stale = pair.bundle(self.snapshot, "stale")
        with Pair(SIZE) as other:
            self.foreign = pair.directory / "foreign"
            shutil.copytree(other.bundle(other.snapshot()), self.foreign)
        self.image = pair.directory / "image"
        self.image.write_bytes(bytes(SIZE))
        pair.primary.verb("restore", "v", "--lost", "1MiB-2MiB")
        wait_until("the link is up", lambda: pair.primary.status()["backups"][0]["connected"])

    def refused(
        self, daemon: Daemon, words: Sequence[object], *says: str, code: int, kind: str
    ) -> None:
        """Refused; devices, bundles and the volume's state are as before."""
        pair = self.pair
        before = pair.primary.status()
        refused(
            asking(daemon),
            words,
            code=code,
            kind=kind,
            says=says,
            untouched=[pair.primary_device, pair.mirror_device, self.stale, self.foreign],
        )
        after = pair.primary.status()
        for key in ("generation", "missing_bytes", "unsent_bytes", "bytes_merged"):
            assert after[key] == before[key], key


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One for all tests that must change nothing."""
    with Pair(SIZE) as pair:
        yield Served(pair)


# Bundles that are not of this volume, or of another life of it.


def test_a_bundle_of_another_volume_is_refused(served: Served) -> None:
    words = ["merge", served.foreign, "v"]
    says = ["expected volume", "found volume", "merge the bundle of this volume"]
    served.refused(served.pair.primary, words, *says, code=NOT_OURS, kind="IdentityError")


def test_a_plain_image_is_refused_by_a_volume_that_is_served(served: Served) -> None:
    words = ["merge", served.image, "v"]
    says = ["expected a bundle of volume", "found the plain image", "make one of a snapshot"]
    served.refused(served.pair.primary, words, *says, code=NOT_OURS, kind="IdentityError")


def test_of_several_media_none_is_merged_where_one_is_wrong(served: Served) -> None:
    fresh = served.pair.bundle(served.pair.snapshot(), "fresh")
    words = ["merge", fresh, served.foreign, "v"]
    says = ["expected volume", "found volume"]
    served.refused(served.pair.primary, words, *says, code=NOT_OURS, kind="IdentityError")


def test_a_damaged_manifest_is_refused(served: Served) -> None:
    bad = served.pair.directory / "bad"
    shutil.copytree(served.foreign, bad)
    os.truncate(bad / "manifest.json", 100)
    words = ["merge", bad, "v"]
    says = ["manifest.json", "damaged or cut off", "copy it from the medium"]
    served.refused(served.pair.primary, words, *says, code=NOT_OURS, kind="IntegrityError")


# Words.


@pytest.mark.parametrize("lost", ["3MiB-5MiB", "4MiB-5MiB", "2MiB-1MiB", "x"])
def test_a_loss_outside_the_volume_is_refused(served: Served, lost: str) -> None:
    words = ["restore", "v", "--lost", "0-1MiB", lost]
    served.refused(
        served.pair.primary, words, "expected a range", "found", code=USAGE, kind="UsageError"
    )


@pytest.mark.parametrize("select", ["3MiB-5MiB", "4MiB-5MiB"])
def test_a_selection_outside_the_volume_is_refused(served: Served, select: str) -> None:
    says = ["expected a range", "found"]
    for daemon in (served.pair.primary, served.pair.backup):
        words: list[object] = ["snapshot", "v", "--select", select]
        served.refused(daemon, words, *says, code=USAGE, kind="UsageError")
    to = served.pair.directory / "never"
    words = ["bundle", "create", f"v@{served.snapshot}", "--to", to, "--select", select]
    served.refused(served.pair.backup, words, *says, code=USAGE, kind="UsageError")
    assert not to.exists()


@pytest.mark.parametrize(
    "words",
    [
        ["restore", "w", "--lost", "all"],
        ["snapshot", "w"],
        ["verify", "w"],
        ["status", "w"],
        ["map", "show", "w"],
        ["merge", "/proc/self", "w"],
    ],
)
def test_a_volume_that_is_not_served_is_named_with_those_that_are(
    served: Served, words: list[object]
) -> None:
    says = ["expected a volume of", "(v)", "found 'w'"]
    served.refused(served.pair.primary, words, *says, code=USAGE, kind="UsageError")


def test_what_only_the_other_role_can_do_is_refused(served: Served) -> None:
    for words in (["restore", "v", "--lost", "all"], ["merge", served.stale, "v"], ["verify", "v"]):
        says = ["expected a volume in the role primary", "ask the daemon of the primary"]
        served.refused(served.pair.backup, words, *says, code=USAGE, kind="UsageError")
    for words in (["snapshot", "v", "--list"], ["snapshot", "v", "--delete", UNKNOWN]):
        says = ["expected a volume in the role backup", "ask the daemon of the backup"]
        served.refused(served.pair.primary, words, *says, code=USAGE, kind="UsageError")


def test_a_snapshot_that_is_not_there_is_named(served: Served) -> None:
    to = served.pair.directory / "never"
    for words in (
        ["bundle", "create", f"v@{UNKNOWN}", "--to", to],
        ["snapshot", "v", "--delete", UNKNOWN],
    ):
        says = ["expected a snapshot", f"found none called {UNKNOWN}", "--list"]
        served.refused(served.pair.backup, words, *says, code=USAGE, kind="UsageError")
    words = ["bundle", "create", "v@monday", "--to", to]
    served.refused(
        served.pair.backup, words, "expected a UUID", "monday", code=USAGE, kind="UsageError"
    )
    assert not to.exists()


def test_a_bundle_is_never_made_among_files(served: Served) -> None:
    words = ["bundle", "create", f"v@{served.snapshot}", "--to", served.foreign]
    says = ["expected a new or an empty directory", "found files"]
    served.refused(served.pair.backup, words, *says, code=USAGE, kind="UsageError")


def test_the_map_of_a_running_daemon_is_busy(served: Served) -> None:
    state = served.pair.directory / "primary-state" / "v" / "overwrite.map"
    for words in (
        ["map", "show", state],
        ["map", "mark", state, "0-4KiB"],
        ["merge", served.stale, served.image, "--map", state],
    ):
        says = [str(state.parent), "in use by another process", "stop it first"]
        served.refused(served.pair.primary, words, *says, code=BUSY, kind="BusyError")


def test_the_device_of_a_running_daemon_is_busy(served: Served, tmp_path: Path) -> None:
    over = tmp_path / "over.map"
    run([PROGRAM, "map", "create", over, "--size", str(SIZE)])
    words = ["merge", served.stale, served.pair.primary_device, "--map", over]
    says = ["primary.img", "in use by another process", "stop it first"]
    served.refused(served.pair.primary, words, *says, code=BUSY, kind="BusyError")


def test_a_bundle_that_fits_is_merged_and_a_second_time_writes_nothing() -> None:
    with Pair(SIZE) as pair:
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 4M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        pair.primary.verb("restore", "v", "--lost", "1MiB-2MiB")
        bundle = pair.bundle(pair.snapshot())
        assert pair.merge(bundle)["bytes_written"] == MIB
        again = pair.merge(bundle)
        assert (again["bytes_written"], again["bytes_skipped"]) == (0, SIZE)
        assert pair.primary.status()["missing_bytes"] == 0


# Daemons that must not start.


@pytest.fixture
def stopped() -> Iterator[Pair]:
    """A pair that never ran."""
    pair = Pair(SIZE)
    for role in ("primary", "backup"):
        (pair.directory / f"{role}-state").rmdir()
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture
def used() -> Iterator[Pair]:
    """A pair that ran, has content and a snapshot, and was stopped."""
    with Pair(SIZE) as pair:
        run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 4M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        pair.snapshot()
        run(["qemu-io", "-f", "raw", "-c", "write -P 8 0 1M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        pair.primary.stop()
        pair.backup.stop()
        yield pair


def replace(daemon: Daemon, old: str, new: str) -> None:
    """Changes the configuration."""
    text = daemon.configuration.read_text()
    assert old in text
    daemon.configuration.write_text(text.replace(old, new))


def serve_refused(pair: Pair, daemon: Daemon, *says: str, code: int, kind: str) -> None:
    """`serve` ends by itself, and nothing in the whole place has changed."""
    refused(asking(daemon), ["serve"], code=code, kind=kind, says=says, untouched=[pair.directory])


def test_addresses_in_use_are_refused_before_anything_is_made(
    served: Served, stopped: Pair
) -> None:
    taken, backup = served.pair, stopped.backup
    text = backup.configuration.read_text()
    for old, new in (
        (f"127.0.0.1:{stopped.link_port}", f"127.0.0.1:{taken.link_port}"),
        (f"unix:{stopped.backup_socket}", f"unix:{taken.backup_socket}"),
        (f"unix:{stopped.backup_socket}", f"tcp:127.0.0.1:{taken.port}"),
        (f"{stopped.directory}/backup.ctl", f"{taken.directory}/backup.ctl"),
    ):
        replace(backup, old, new)
        says = [new.removeprefix("unix:").removeprefix("tcp:"), "in use by another process"]
        serve_refused(stopped, backup, *says, "stop it", code=BUSY, kind="BusyError")
        backup.configuration.write_text(text)


def test_a_socket_path_that_is_another_file_is_refused(stopped: Pair) -> None:
    stopped.backup_socket.write_text("mine")
    says = [str(stopped.backup_socket), "found another file", "choose another path"]
    serve_refused(stopped, stopped.backup, *says, code=BUSY, kind="BusyError")


def test_a_state_directory_in_use_is_refused(served: Served) -> None:
    daemon = served.pair.primary
    says = ["primary-state", "the only daemon of this state directory", "stop it first"]
    served.refused(daemon, ["serve"], *says, code=BUSY, kind="BusyError")


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_a_device_in_use_is_refused(served: Served, stopped: Pair, role: str) -> None:
    daemon = getattr(stopped, role)
    device = stopped.primary_device if role == "primary" else stopped.mirror_device
    replace(daemon, str(device), str(served.pair.mirror_device))
    says = ["mirror.img", "in use by another process", "stop it first"]
    serve_refused(stopped, daemon, *says, code=BUSY, kind="BusyError")


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_a_device_that_is_missing_too_small_or_none_is_refused(stopped: Pair, role: str) -> None:
    daemon = getattr(stopped, role)
    device = stopped.primary_device if role == "primary" else stopped.mirror_device
    text = daemon.configuration.read_text()
    replace(daemon, f'size = "{SIZE}"', "")
    says = [str(device), "no such device or file", "give a size"]
    serve_refused(stopped, daemon, *says, code=FAILED, kind="DeviceError")
    daemon.configuration.write_text(text)
    device.write_bytes(bytes(SIZE - 512))
    says = [
        str(device),
        f"expected at least {SIZE} bytes",
        f"found {SIZE - 512}",
        "a larger device",
    ]
    serve_refused(stopped, daemon, *says, code=USAGE, kind="UsageError")
    device.write_bytes(bytes(SIZE + 1))
    says = [str(device), "multiple of 512", f"found {SIZE + 1}"]
    serve_refused(stopped, daemon, *says, code=USAGE, kind="UsageError")
    device.unlink()
    device.mkdir()
    says = [str(device), "expected a regular file or a block device", "found a directory"]
    serve_refused(stopped, daemon, *says, code=USAGE, kind="UsageError")


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_a_device_that_was_there_once_is_never_made_anew(used: Pair, role: str) -> None:
    daemon = getattr(used, role)
    device = used.primary_device if role == "primary" else used.mirror_device
    device.unlink()
    says = [str(device), "expected the device of this volume", "found nothing", "bring it back"]
    serve_refused(used, daemon, *says, code=FAILED, kind="DeviceError")
    for length in (0, SIZE // 2):
        device.write_bytes(bytes(length))
        says = [str(device), f"at least the {SIZE} bytes", f"found {length}", "bring the right one"]
        serve_refused(used, daemon, *says, code=NOT_OURS, kind="IdentityError")


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_another_size_or_block_size_than_recorded_is_refused(used: Pair, role: str) -> None:
    daemon = getattr(used, role)
    text = daemon.configuration.read_text()
    replace(daemon, f'size = "{SIZE}"', f'size = "{SIZE // 2}"')
    says = [f"of {SIZE // 2} bytes", f"found one of {SIZE} bytes", "mend the configuration"]
    serve_refused(used, daemon, *says, code=NOT_OURS, kind="IdentityError")
    daemon.configuration.write_text(text)
    replace(daemon, f'size = "{SIZE}"', f'size = "{SIZE}"\nblock_size = "8KiB"')
    says = ["in blocks of 8192", "in blocks of 4096", "mend the configuration"]
    serve_refused(used, daemon, *says, code=NOT_OURS, kind="IdentityError")


# State that is damaged, cut off, newer, missing or of another volume.


def forge(path: Path, slot: int, crc_at: int, offset: int, content: bytes) -> None:
    """Changes a slot and makes its checksum right again: what a newer program writes."""
    held = bytearray(path.read_bytes())
    whole = held[slot : slot + SLOT]
    whole[offset : offset + len(content)] = content
    whole[crc_at : crc_at + 4] = bytes(4)
    summed = whole if crc_at < SLOT - 4 else whole[:crc_at]
    whole[crc_at : crc_at + 4] = struct.pack("<I", crc32c(bytes(summed)))
    held[slot : slot + SLOT] = whole
    path.write_bytes(held)


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_map_that_is_cut_off_damaged_or_newer_is_refused(used: Pair) -> None:
    state = used.directory / "primary-state" / "v"
    path = state / "overwrite.map"
    whole = path.read_bytes()
    for length in (100, SLOT, 2 * SLOT, 2 * SLOT + 77):
        os.truncate(path, length)
        kind = "FormatError" if length == SLOT else "IntegrityError"
        says = [str(state), "expected", "found"]
        serve_refused(used, used.primary, *says, code=NOT_OURS, kind=kind)
        path.write_bytes(whole)
    for slot in (0, SLOT):
        patch(path, slot, b"NOTAMAP!")
    says = [str(state), "expected a map with magic", "found"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="FormatError")
    path.write_bytes(whole)
    forge(path, SLOT, SLOT - 4, 8, b"\x02")
    says = [str(state), "version 1", "found version 2", "or a newer one"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="FormatError")


def test_an_intent_log_that_is_cut_off_newer_or_of_another_volume_is_refused(used: Pair) -> None:
    state = used.directory / "primary-state" / "v"
    path = state / "intent.log"
    whole = path.read_bytes()
    os.truncate(path, SLOT)
    says = [str(state), "expected 8192 bytes", "found 4096", "remove it"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="IntegrityError")
    path.write_bytes(whole)
    forge(path, 0, 52, 8, b"\x02")
    says = [str(state), "an intent log of version 1", "found version 2", "or a newer one"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="FormatError")
    path.write_bytes(whole)
    for slot in (0, SLOT):
        forge(path, slot, 52, 16, b"\xaa" * 16)
    says = [str(state), "expected the intent log of volume", "found that of aaaaaaaa"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="IdentityError")


def test_an_intent_log_that_is_damaged_puts_every_block_in_doubt_and_no_more(used: Pair) -> None:
    path = used.directory / "primary-state" / "v" / "intent.log"
    patch(path, 600, b"damage")
    patch(path, SLOT + 600, b"damage")
    used.backup.start()
    used.primary.start()
    assert used.primary.status()["recovered_unsent_blocks"] == SIZE // 4096
    used.wait_mirrored()
    used.stop_and_compare()


def test_a_record_of_the_known_backup_that_is_not_understood_is_refused(used: Pair) -> None:
    state = used.directory / "primary-state" / "v"
    (state / "known-backup").write_text("dualrestore-known-backup 2 x\n")
    says = [str(state), "known-backup", "expected a line", "found another", "remove it"]
    serve_refused(used, used.primary, *says, code=NOT_OURS, kind="FormatError")


def test_a_catalogue_that_is_cut_off_damaged_or_newer_is_refused(used: Pair) -> None:
    state = used.directory / "backup-state" / "v"
    path = state / "catalogue"
    whole = path.read_bytes()
    for content, kind, says in (
        (
            whole[: len(whole) // 2],
            "IntegrityError",
            ("damaged", "expected", "bring the file back"),
        ),
        (whole[:-20] + b"x" + whole[-19:], "IntegrityError", ("damaged", "with checksum")),
        (b"", "FormatError", ("expected a record of format", "bring the file back")),
        (b"text" * 99, "FormatError", ("expected a record of format", "found another")),
        (
            whole.replace(b"catalogue 1", b"catalogue 2"),
            "FormatError",
            ("found version 2", "newer"),
        ),
    ):
        path.write_bytes(content)
        serve_refused(used, used.backup, str(state), *says, code=NOT_OURS, kind=kind)


def test_a_changed_map_that_is_cut_off_or_missing_is_refused(used: Pair) -> None:
    state = used.directory / "backup-state" / "v"
    newest = max(state.glob("changed-*.map"))
    os.truncate(newest, 5000)
    says = [str(newest), "expected a file of whole sectors", "found 5000 bytes", "bring it back"]
    serve_refused(used, used.backup, *says, code=NOT_OURS, kind="IntegrityError")
    newest.unlink()
    says = [str(newest), "expected a file that belongs here", "found nothing", "bring it back"]
    serve_refused(used, used.backup, *says, code=NOT_OURS, kind="IntegrityError")


def test_a_snapshot_whose_map_is_cut_off_is_broken_and_never_a_bundle(used: Pair) -> None:
    [path] = (used.directory / "backup-state" / "v").glob("snapshots/*/preserved.map")
    os.truncate(path, 0)
    used.backup.start()
    [shown] = json.loads(used.backup.verb("snapshot", "v", "--list", "--json").stdout)
    assert "preserved.map" in shown["broken"]
    to = used.directory / "never"
    refused(
        asking(used.backup),
        ["bundle", "create", f"v@{shown['snapshot']}", "--to", to],
        code=NOT_OURS,
        kind="IntegrityError",
        says=["is broken", "preserved.map", "take a new snapshot"],
        untouched=[used.mirror_device, to],
    )


# The backup: unreachable, of the wrong role, name, volume or authority, or another one.


def link_refused(pair: Pair, *says: str) -> None:
    """What needs the link fails at once and says why; the volume is as before."""
    wait_until("the reason is known", lambda: bool(pair.primary.status()["backups"][0]["error"]))
    for verb in ("snapshot", "verify"):
        refused(
            asking(pair.primary),
            [verb, "v"],
            code=LINK_DOWN,
            kind="LinkError",
            says=["the link to the backup is down", *says, "try again"],
            untouched=[pair.primary_device, pair.mirror_device],
        )
    status = pair.primary.status()
    assert (status["backups"][0]["connected"], status["mirrored"]) == (False, False)
    assert "Traceback" not in pair.primary.words() + pair.backup.words()


def test_a_backup_that_is_unreachable_is_named(used: Pair) -> None:
    used.primary.start()
    link_refused(used, f"127.0.0.1:{used.link_port}", "refused")


def test_a_first_restore_without_its_backup_is_refused_and_can_be_said_again(
    stopped: Pair,
) -> None:
    stopped.primary_device.write_bytes(b"\xee" * SIZE)
    stopped.primary.start()
    # Once only: it waits for the backup for a while.
    told = asking(stopped.primary)(["restore", "v", "--lost", "all", "--json"])
    error = json.loads(told.err)["error"]
    assert (told.code, told.out, error["kind"]) == (LINK_DOWN, "", "LinkError")
    assert "has no map" in error["message"]
    assert "the backup was not reached" in error["message"]
    assert stopped.primary_device.read_bytes() == b"\xee" * SIZE
    status = stopped.primary.status()
    assert (status["state"], status["generation"]) == ("waiting", 0)
    bundle = stopped.directory / "bundle"
    image = stopped.directory / "image"
    image.write_bytes(bytes(SIZE))
    run([PROGRAM, "bundle", "create", image, "--to", bundle])
    for words in (["merge", bundle, "v"], ["snapshot", "v"], ["verify", "v"]):
        refused(
            asking(stopped.primary),
            words,
            code=BUSY,
            kind="BusyError",
            says=["volume v waits for your word", "restore v --lost none", "--lost all"],
            untouched=[stopped.primary_device],
        )


def test_a_backup_of_another_name_or_role_is_refused(used: Pair, stopped: Pair) -> None:
    used.backup.start()
    where = f"127.0.0.1:{used.link_port}/v"
    replace(used.primary, where, where[:-1] + "w")
    used.primary.start()
    link_refused(used, "expected a volume in the role backup called `w`", "found none", "backups")
    used.primary.stop()
    # Another primary of that name listens.
    port = free_port()
    replace(stopped.primary, "[node]\n", f'[node]\nlisten = "127.0.0.1:{port}"\n')
    stopped.primary.start()
    replace(used.primary, where[:-1] + "w", f"127.0.0.1:{port}/v")
    used.primary.start()
    link_refused(used, "expected a volume in the role backup called `v`", "found none")


def test_a_backup_of_another_volume_is_refused(used: Pair) -> None:
    with Pair(SIZE) as other:
        run(["qemu-io", "-f", "raw", "-c", "write -P 9 0 4M", "-c", "flush", other.uri])
        other.wait_mirrored()
        other.primary.stop()
        used.primary.start()
        used.primary.verb("restore", "v", "--lost", "none")
        used.primary.stop()
        replace(used.primary, f":{used.link_port}/v", f":{other.link_port}/v")
        used.primary.start()
        link_refused(used, "expected UUID", "found", "this backup holds another volume")


def test_the_map_of_another_volume_is_refused_by_the_backup(used: Pair) -> None:
    with Pair(SIZE) as other:
        other.primary.verb("restore", "v", "--lost", "none")
        other.wait_mirrored()
        other.primary.stop()
        state = used.directory / "primary-state" / "v"
        shutil.rmtree(state)
        shutil.copytree(other.directory / "primary-state" / "v", state)
    used.backup.start()
    used.primary.start()
    link_refused(used, "expected UUID", "this backup holds another volume")


def test_a_backup_in_the_place_of_another_is_sent_everything(used: Pair) -> None:
    shutil.rmtree(used.directory / "backup-state")
    used.mirror_device.unlink()
    used.backup.start()
    used.primary.start()
    used.wait_mirrored()
    used.stop_and_compare()


def test_a_backup_in_the_place_of_another_is_refused_while_blocks_are_missing(used: Pair) -> None:
    used.backup.start()
    used.primary.start()
    used.primary.verb("restore", "v", "--lost", "0-1MiB")
    used.primary.stop()
    used.backup.stop()
    shutil.rmtree(used.directory / "backup-state")
    used.mirror_device.unlink()
    used.backup.start()
    used.primary.start()
    link_refused(used, "expected backup", "found backup", "bring that one back", "--lost none")
    used.primary.verb("restore", "v", "--lost", "none")
    used.wait_mirrored()
    used.stop_and_compare()


def test_a_certificate_of_another_authority_is_refused(used: Pair) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    set_tls(used.backup, write_pki(used.directory / "backup-pki", authority, authority))
    set_tls(used.primary, write_pki(used.directory / "primary-pki", stranger, authority))
    used.backup.start()
    used.primary.start()
    link_refused(used, f"127.0.0.1:{used.link_port}", "certificate")


def test_a_tls_directory_that_lacks_or_mixes_its_files_is_refused(stopped: Pair) -> None:
    authority = trustme.CA()
    pki = write_pki(stopped.directory / "pki", authority, authority)
    set_tls(stopped.backup, pki)
    key = (pki / "server-key.pem").read_bytes()
    for name, change, says in (
        ("server-key.pem", None, ("expected a file in the tls directory", "found none")),
        ("ca-cert.pem", None, ("expected a file in the tls directory", "found none")),
        ("server-key.pem", (pki / "client-key.pem").read_bytes(), ("belong together", "found")),
        ("server-cert.pem", b"text", ("expected PEM", "found")),
    ):
        held = (pki / name).read_bytes()
        (pki / name).unlink()
        if change is not None:
            (pki / name).touch(mode=0o600)
            (pki / name).write_bytes(change)
        whole = (str(pki), *says)
        serve_refused(stopped, stopped.backup, *whole, code=USAGE, kind="ConfigurationError")
        (pki / name).touch(mode=0o600)
        (pki / name).write_bytes(held)
    assert (pki / "server-key.pem").read_bytes() == key
    (pki / "server-key.pem").chmod(0o640)
    mode = ["server-key.pem", "only its owner may read", "found 0640", "chmod 600"]
    serve_refused(stopped, stopped.backup, *mode, code=USAGE, kind="ConfigurationError")
