"""A disk that was swapped behind a map that survived is neither read nor sent anywhere."""

from __future__ import annotations

import shutil
from typing import Any

import pytest

from tests.e2e.harness import MIB, Pair, garbage, run, same_bytes, wait_until
from tests.e2e.nbd_client import NbdClient

SIZE = 16 * MIB


@pytest.mark.parametrize("clean", [False, True], ids=["killed", "stopped"])
def test_a_replaced_disk_is_refused_until_the_word_and_the_backup_keeps_its_bytes(
    clean: bool,
) -> None:
    with Pair(SIZE) as pair:
        image, before = pair.directory / "image.raw", pair.directory / "before.raw"
        garbage(image, SIZE)
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        wait_until("no extent to be hot", lambda: pair.primary.status()["hot_extents"] == 0)
        with NbdClient(pair.socket, "v") as client:
            # Hot extents: after a kill they are to be sent again.
            client.write(3 * MIB, b"\x11" * 4096)
            client.flush()
        run(["nbdcopy", pair.uri, before])
        if clean:
            pair.primary.stop()
        else:
            pair.primary.kill()
        garbage(pair.directory / "primary.img", SIZE)
        pair.primary.start()
        wait_until("the volume to be refused", lambda: pair.primary.status()["state"] == "failed")
        status = pair.primary.status()
        assert "replaced or changed" in status["error"]
        assert "restore --lost all" in status["error"]
        with NbdClient(pair.socket, "v") as client, pytest.raises(OSError, match="error"):
            client.read(0, 4096)
        pair.primary.verb("restore", "v", "--lost", "all")
        after = pair.directory / "after.raw"
        run(["nbdcopy", pair.uri, after])
        assert same_bytes(before, after)
        pair.wait_mirrored()
        pair.stop_and_compare()


def replace_backup(pair: Pair) -> None:
    """Another backup, new and empty, in the place of the one before."""
    pair.backup.stop()
    shutil.rmtree(pair.directory / "backup-state")
    pair.mirror_device.unlink()
    pair.backup.start()


@pytest.mark.parametrize("restarted", [False, True], ids=["primary running", "primary restarted"])
def test_a_new_backup_is_not_taken_for_the_one_that_has_everything(*, restarted: bool) -> None:
    with Pair(SIZE) as pair:
        image = pair.directory / "image.raw"
        garbage(image, SIZE)
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        if restarted:
            pair.primary.stop()
        replace_backup(pair)
        if restarted:
            pair.primary.start()
        wait_until("it is noticed", lambda: pair.primary.status()["bytes_resent"] == SIZE)
        pair.wait_mirrored()
        pair.stop_and_compare()
        assert same_bytes(pair.mirror_device, image)


def test_a_new_backup_is_asked_for_nothing_that_only_the_one_before_has() -> None:
    with Pair(SIZE, more='missing_deadline = "1s"') as pair:
        image = pair.directory / "image.raw"
        garbage(image, SIZE)
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        pair.lose_disk()
        replace_backup(pair)
        wait_until("it is told", lambda: "backup" in (link(pair)["error"] or ""))
        assert not link(pair)["connected"]
        with NbdClient(pair.socket, "v") as client, pytest.raises(OSError, match="error"):
            client.read(0, 4096)


def link(pair: Pair) -> dict[str, Any]:
    """What the primary knows of its backup."""
    (backup,) = pair.primary.status()["backups"]
    assert isinstance(backup, dict)
    return backup


@pytest.mark.parametrize("side", ["primary", "backup"])
def test_a_device_that_is_missing_is_asked_for_and_not_made_anew(side: str) -> None:
    with Pair(SIZE) as pair:
        image, elsewhere = pair.directory / "image.raw", pair.directory / "elsewhere"
        garbage(image, SIZE)
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        daemon, device = {
            "primary": (pair.primary, pair.primary_device),
            "backup": (pair.backup, pair.mirror_device),
        }[side]
        daemon.stop()
        device.rename(elsewhere)
        daemon.launch()
        assert daemon.process is not None
        assert daemon.process.wait(20) != 0
        assert device.name in daemon.words()
        assert not device.exists()
        elsewhere.rename(device)
        daemon.start()
        pair.wait_mirrored()
        pair.stop_and_compare()
