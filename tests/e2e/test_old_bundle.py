"""Two losses, and a bundle from before the second: the backup says what of it is still right."""

from __future__ import annotations

import json

from tests.e2e.harness import MIB, Pair, run, wait_until
from tests.e2e.nbd_client import NbdClient

WRITTEN = [(3 * MIB + 4096, 12288), (9 * MIB, 2 * MIB), (20 * MIB + 512, 512)]
"""What the application writes between the bundle and the second loss: offset, length."""
STALE = 12288 + 2 * MIB + 4096


def test_an_old_bundle_supplies_what_did_not_change_and_nothing_else() -> None:
    with Pair(32 * MIB, more='missing_deadline = "2s"') as pair:
        image = bytearray(bytes(range(256)) * (pair.size // 256))
        image[16 * MIB : 18 * MIB] = bytes(2 * MIB)
        path = pair.directory / "image.raw"
        path.write_bytes(image)
        run(["nbdcopy", path, pair.uri])
        pair.wait_mirrored()
        pair.lose_disk()
        bundle = pair.bundle(pair.snapshot())
        pair.merge(bundle)
        with NbdClient(pair.socket, "v") as client:
            for number, (offset, length) in enumerate(WRITTEN):
                fresh = bytes([0x80 + number]) * length
                client.write(offset, fresh)
                image[offset : offset + length] = fresh
            client.flush()
        pair.wait_mirrored()
        pair.lose_disk()

        # Without the backup nobody knows what of it is still right.
        pair.backup.stop()
        missing = pair.primary.status()["missing_bytes"]
        for verb in ("merge", "attach"):
            refused = pair.primary.verb(verb, bundle, "v", expect=5).stderr
            assert "made before the volume was lost" in refused
            assert "when the link is up" in refused
        assert pair.primary.status()["missing_bytes"] == missing == pair.size
        assert pair.primary.status()["media"] == []

        # Attached: what did not change from the medium, what did over the link.
        pair.backup.start()
        wait_until("the link is up", lambda: pair.primary.status()["backups"][0]["connected"])
        [medium] = pair.primary.verb_json("attach", bundle, "v")["media"]
        assert medium["state"] == "attached"
        with NbdClient(pair.socket, "v") as client:
            assert client.read(8 * MIB, 4 * MIB) == image[8 * MIB : 12 * MIB]
        status = pair.primary.status()
        assert (status["bytes_from_media"], status["bytes_fetched"]) == (2 * MIB, 2 * MIB)

        # What the backup vouched for is good for the session.
        pair.backup.stop()
        wait_until("void", lambda: pair.primary.status()["media"][0]["state"] == "unvouched")
        pair.backup.start()
        wait_until("again", lambda: pair.primary.status()["media"][0]["state"] == "attached")

        # Merged: the rest of what did not change.
        report = pair.primary.verb_json("merge", bundle, "v")
        assert report["bytes_stale"] == STALE - 2 * MIB
        assert report["bytes_skipped"] == 4 * MIB
        assert report["bytes_written"] == pair.size - 4 * MIB - report["bytes_stale"]
        assert pair.primary.status()["missing_bytes"] == report["bytes_stale"]
        with NbdClient(pair.socket, "v") as client:
            assert client.read(0, pair.size) == image
        assert pair.primary.status()["missing_bytes"] == 0
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_several_bundles_of_different_age_are_merged_by_one_command() -> None:
    with Pair(8 * MIB) as pair:
        path = pair.directory / "image.raw"
        path.write_bytes(b"\x11" * pair.size)
        run(["nbdcopy", path, pair.uri])
        pair.wait_mirrored()
        old = pair.bundle(pair.snapshot(), "old")
        with NbdClient(pair.socket, "v") as client:
            client.write(MIB, b"\x22" * MIB)
            client.flush()
        pair.wait_mirrored()
        pair.lose_disk()
        chosen = pair.primary.verb_json("snapshot", "v", "--select", "512KiB-3MiB")["snapshot"]
        new = pair.bundle(chosen, "new")
        report = json.loads(
            pair.primary.verb("merge", old, new, "v", "--json").stdout.splitlines()[-1]
        )
        assert pair.primary.status()["missing_bytes"] == 0
        assert report["bytes_written"] == pair.size
        with NbdClient(pair.socket, "v") as client:
            found = client.read(0, pair.size)
        assert found == b"\x11" * MIB + b"\x22" * MIB + b"\x11" * (6 * MIB)
        pair.wait_mirrored()
        pair.stop_and_compare()
