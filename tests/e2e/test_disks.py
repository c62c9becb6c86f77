"""Disks as they are: slow ones, and ones that fail."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, Pair
from tests.e2e.mounted import FuseFile
from tests.e2e.nbd_client import NbdClient
from tests.e2e.stamps import BLOCK, Shadow
from tests.e2e.workload import Workload, check_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 4 * MIB
pytestmark = pytest.mark.root


@contextmanager
def disks(pair: Pair, primary: list[str], backup: list[str]) -> Iterator[None]:
    """Puts nbdkit with a filter and its settings behind the devices; starts both daemons."""
    behind: list[FuseFile] = []
    try:
        for device, (name, *settings) in (
            (pair.primary_device, primary),
            (pair.mirror_device, backup),
        ):
            store = device.with_suffix(".store")
            store.touch()
            os.truncate(store, pair.size)
            server: list[str | Path] = [
                "[",
                "nbdkit",
                f"--filter={name}",
                "file",
                store,
                *settings,
                "]",
            ]
            behind.append(FuseFile(device.with_suffix(".fuse"), server))
            behind[-1].attach()
            device.symlink_to(behind[-1].path)
        with pair:
            pair.primary.verb("restore", "v", "--lost", "none")
            pair.wait_mirrored()
            yield
    finally:
        pair.close()
        for file in behind:
            file.detach()


def fails(what: str, trigger: Path) -> list[str]:
    """A disk on which every `pread` or `pwrite` fails while the trigger exists."""
    return ["error", f"error-{what}=EIO", f"error-{what}-rate=100%", f"error-{what}-file={trigger}"]


def test_slow_disks_change_nothing_but_the_time(seed: int) -> None:
    pair = Pair(SIZE)
    slow = ["delay", "rdelay=3ms", "wdelay=10ms"]
    slower = ["delay", "rdelay=10ms", "wdelay=40ms"]
    with disks(pair, slow, slower):
        shadow = Shadow(bytes(SIZE), seed)
        pair.primary.verb("restore", "v", "--lost", "all")
        medium = pair.bundle(pair.snapshot())
        workload = Workload(pair, shadow)
        workload.start()
        workload.wait_for_writes(50)
        pair.merge(medium)
        workload.wait_for_writes(50)
        workload.finish()
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_current_block_that_cannot_be_read_here_is_fetched_and_healed() -> None:
    pair = Pair(SIZE, more="direct = true")
    trigger = pair.directory / "trigger"
    with disks(pair, fails("pread", trigger), ["nofilter"]):
        with NbdClient(pair.socket, "v") as client:
            client.write(0, b"\x61" * MIB)
            client.flush()
            trigger.touch()
            assert client.read(0, MIB) == b"\x61" * MIB
            trigger.unlink()
            assert pair.primary.status()["bytes_fetched"] == MIB
            assert client.read(0, MIB) == b"\x61" * MIB
            assert pair.primary.status()["bytes_fetched"] == MIB, "healed: read here"
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_primary_whose_disk_takes_no_writes_says_so_and_the_sides_stay_the_same() -> None:
    pair = Pair(SIZE, more="direct = true")
    trigger = pair.directory / "trigger"
    with disks(pair, fails("pwrite", trigger), ["nofilter"]):
        with NbdClient(pair.socket, "v") as client:
            client.write(0, b"\x61" * BLOCK)
            trigger.touch()
            with pytest.raises(OSError, match="answered with an error"):
                client.write(0, b"\x62" * BLOCK)
            trigger.unlink()
            client.write(BLOCK, b"\x63" * BLOCK)
            client.flush()
            held = client.read(0, BLOCK)
            assert held in {b"\x61" * BLOCK, b"\x62" * BLOCK}
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_backup_whose_disk_fails_is_left_behind_and_caught_up_with() -> None:
    pair = Pair(SIZE)
    trigger = pair.directory / "trigger"
    with disks(pair, ["nofilter"], fails("pwrite", trigger)):
        with NbdClient(pair.socket, "v") as client:
            trigger.touch()
            client.write(0, b"\x61" * MIB)
            client.flush()
            assert client.read(0, MIB) == b"\x61" * MIB
            status = pair.primary.status()
            assert (status["mirrored"], status["unsent_bytes"]) == (False, MIB)
            assert "mirror.img: write" in status["backups"][0]["error"], status
            said = pair.backup.status()
            assert said["state"] == "failed", said
            assert "mirror.img: write" in said["error"], said
            trigger.unlink()
            pair.backup.kill()
            pair.backup.start()
        pair.wait_mirrored()
        pair.stop_and_compare()
