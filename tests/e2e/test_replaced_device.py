"""A disk that was swapped behind a map that survived is neither read nor sent anywhere."""

from __future__ import annotations

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
