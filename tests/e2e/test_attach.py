"""A plugged-in bundle as a read source: with the link down, pulled out, damaged, foreign."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.harness import MIB, Pair, run, wait_until
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGE = bytes(range(256)) * (4 * MIB // 256) + bytes(2 * MIB)


class Scene:
    """A pair whose primary lost its disk, and a bundle of what the backup holds."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.image = IMAGE * (pair.size // len(IMAGE)) + bytes(pair.size % len(IMAGE))
        path = pair.directory / "image.raw"
        path.write_bytes(self.image)
        run(["nbdcopy", path, pair.uri])
        pair.wait_mirrored()
        pair.lose_disk()
        self.bundle = pair.bundle(pair.snapshot())

    def attach(self, *bundles: Path, expect: int = 0) -> Any:
        """The report of `attach`, or its error."""
        words = ["attach", *(bundles or [self.bundle]), "v", "--json"]
        done = self.pair.primary.verb(*words, expect=expect)
        return json.loads(done.stdout) if expect == 0 else done.stderr

    @property
    def media(self) -> list[dict[str, Any]]:
        """As `status` has them."""
        media = self.pair.primary.status()["media"]
        assert isinstance(media, list)
        return media

    def read(self, offset: int, length: int) -> bytes:
        """Through the primary's export, compared with the image."""
        with NbdClient(self.pair.socket, "v") as client:
            found = client.read(offset, length)
        assert found == self.image[offset : offset + length], f"{length} bytes at {offset}"
        return found


@pytest.fixture
def scene() -> Iterator[Scene]:
    """32 MiB, lost; a read of a missing block waits for the link for two seconds."""
    with Pair(32 * MIB, more='missing_deadline = "2s"') as pair:
        yield Scene(pair)


def test_missing_blocks_are_read_from_the_medium_with_the_link_down(scene: Scene) -> None:
    pair = scene.pair
    pair.backup.stop()
    report = scene.attach()
    assert [medium["state"] for medium in report["media"]] == ["attached"]
    assert report["media"][0]["bytes_covered"] == pair.size
    scene.read(MIB - 512, 2 * MIB)
    with NbdClient(pair.socket, "v") as client:
        client.write(9 * MIB + 512, b"\x66" * 512)
        block = client.read(9 * MIB, 4096)
    assert block == (
        scene.image[9 * MIB : 9 * MIB + 512] + b"\x66" * 512 + scene.image[9 * MIB + 1024 :][:3072]
    )
    status = pair.primary.status()
    assert status["bytes_from_media"] == status["current_bytes"] >= 2 * MIB
    assert (status["bytes_fetched"], status["errors"]) == (0, 0)
    # A restart does not forget it.
    pair.primary.stop()
    pair.primary.start()
    wait_until("it is found again", lambda: scene.media[0]["state"] == "attached")
    scene.read(20 * MIB, MIB)
    # Merged under it.
    merged = pair.merge(scene.bundle)
    assert merged["bytes_written"] > 0
    assert pair.primary.status()["missing_bytes"] == 0
    pair.backup.start()
    pair.wait_mirrored()
    pair.stop_and_compare()


def test_detached_it_serves_nothing_and_may_be_unplugged(scene: Scene) -> None:
    pair = scene.pair
    scene.attach()
    scene.read(0, 4096)
    pair.backup.stop()
    report = pair.primary.verb_json("detach", scene.bundle, "v")
    assert report["media"] == [] == scene.media
    with NbdClient(pair.socket, "v") as client, pytest.raises(OSError, match="NBD command"):
        client.read(8 * MIB, 4096)
    pair.primary.verb("detach", scene.bundle, "v", expect=2)


def test_pulled_out_it_is_gone_and_the_link_brings_the_rest(scene: Scene) -> None:
    scene.attach()
    scene.read(0, 4096)
    elsewhere = scene.bundle.rename(scene.bundle.with_name("pulled-out"))
    scene.read(8 * MIB, MIB)
    [medium] = scene.media
    assert medium["state"] == "gone"
    assert "No such file" in medium["error"]
    status = scene.pair.primary.status()
    assert (status["bytes_fetched"], status["errors"]) == (MIB, 0)
    assert "GONE" in scene.pair.primary.verb("status").stdout
    elsewhere.rename(scene.bundle)
    scene.attach()
    before = scene.pair.primary.status()["bytes_from_media"]
    scene.read(20 * MIB, MIB)
    assert scene.pair.primary.status()["bytes_from_media"] == before + MIB


def test_a_medium_that_is_not_there_after_a_restart_is_said_and_keeps_nobody(scene: Scene) -> None:
    pair = scene.pair
    scene.attach()
    pair.primary.stop()
    scene.bundle.rename(scene.bundle.with_name("at-home"))
    pair.primary.start()
    wait_until("it was looked for", lambda: scene.media[0]["state"] == "refused")
    assert "No such file" in scene.media[0]["error"]
    scene.read(8 * MIB, MIB)
    pair.primary.verb("detach", scene.bundle, "v")
    assert scene.media == []


def test_a_damaged_chunk_comes_over_the_link(scene: Scene) -> None:
    segment = scene.bundle / "seg-00000000.drs"
    with segment.open("r+b") as file:
        file.seek(MIB + 77)
        file.write(b"\x00\x01\x02\x03")
    scene.attach()
    scene.read(0, 8 * MIB)
    [medium] = scene.media
    assert medium["state"] == "attached"
    assert medium["reads_damaged"] > 0
    status = scene.pair.primary.status()
    assert status["bytes_from_media"] + status["bytes_fetched"] == 8 * MIB
    assert 64 * 1024 <= status["bytes_fetched"] <= 3 * MIB


def test_a_foreign_bundle_is_refused_and_a_loss_detaches(scene: Scene) -> None:
    pair = scene.pair
    image = pair.directory / "other.raw"
    image.write_bytes(bytes(pair.size))
    foreign = pair.directory / "foreign"
    pair.backup.verb("bundle", "create", image, "--to", foreign)
    assert "names no volume" in scene.attach(scene.bundle, foreign, expect=5)
    assert scene.media == [], "all or none"
    scene.attach()
    pair.primary.verb("restore", "v", "--lost", "all")
    assert scene.media == []
    pair.backup.stop()
    assert "made before the volume was lost" in scene.attach(expect=5)
    assert scene.media == []
    missing = pair.directory / "nowhere"
    scene.attach(missing, expect=1)
