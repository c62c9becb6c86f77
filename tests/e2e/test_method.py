"""The main job as the README has it: the demo, and the loss of a disk by hand."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.harness import MIB, Pair, dualrestore, run
from tests.e2e.nbd_client import NbdClient


def test_the_demo_proves_itself_and_says_so() -> None:
    report = json.loads(dualrestore("demo", "--size", "64MiB", "--json").stdout)
    assert report["proven"] is True
    for count in ("lost_writes", "stale_reads", "mismatched_blocks"):
        assert report[count] == 0, (count, report)
    for count in (
        "acknowledged_writes",
        "bytes_fetched",
        "bytes_written_live",
        "bytes_merged",
        "bytes_skipped_current",
        "link_bytes",
    ):
        assert report[count] > 0, (count, report)
    assert report["volume_bytes"] == 64 * MIB
    assert report["open_seconds"] < 1


def test_a_lost_disk_opens_at_once_is_merged_and_is_mirrored_again(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (pair.size // 256))
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.lose_disk()
    status = pair.primary.status()
    assert status["missing_bytes"] == pair.size
    with NbdClient(pair.socket, "v") as client:
        assert client.read(5 * MIB, 4096) == bytes(range(256)) * 16, "fetched over the link"
        client.write(6 * MIB, b"\x77" * 4096)
        client.write(7 * MIB + 512, b"\x66" * 512)
        client.trim(8 * MIB, MIB)
        client.flush()
        expected = client.read(0, pair.size // 2)
    assert pair.primary.status()["missing_bytes"] < pair.size
    report = pair.merge(pair.bundle(pair.snapshot()))
    assert report["bytes_written"] > 0
    assert report["bytes_skipped"] >= pair.size // 2
    assert pair.primary.status()["missing_bytes"] == 0
    with NbdClient(pair.socket, "v") as client:
        assert client.read(0, pair.size // 2) == expected
    pair.wait_mirrored()
    pair.stop_and_compare()
    assert (
        pair.primary_device.read_bytes()[pair.size // 2 :] == image.read_bytes()[pair.size // 2 :]
    )


def test_hydration_over_the_wire_alone_completes_the_volume(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (pair.size // 256))
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.primary.verb("restore", "v", "--lost", "1MiB-9MiB", "--wire")
    pair.wait_mirrored()
    pair.stop_and_compare()


def test_hydration_over_the_wire_goes_on_after_the_primary_was_killed(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (pair.size // 256))
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.backup.stop()
    pair.primary.verb("restore", "v", "--lost", "1MiB-9MiB", "--wire")
    pair.primary.kill()
    pair.backup.start()
    pair.primary.start()
    pair.wait_mirrored()
    pair.stop_and_compare()
    assert pair.primary_device.read_bytes() == image.read_bytes()


def test_the_operators_word_is_asked_for_when_devices_hold_something() -> None:
    pair = Pair(8 * MIB)
    try:
        pair.primary_device.write_bytes(b"\x42" * pair.size)
        pair.backup.start()
        pair.primary.start()
        assert pair.primary.status()["state"] == "waiting"
        pair.primary.verb("restore", "v", "--lost", "none")
        pair.wait_mirrored()
        pair.stop_and_compare()
        assert pair.mirror_device.read_bytes() == b"\x42" * pair.size
    finally:
        pair.close()


def test_sixteen_tebibytes_open_in_bounded_memory_after_a_loss() -> None:
    # On ext4 a file ends just below 16 TiB; on tmpfs it does not.
    pair = Pair(16 << 40, place="/dev/shm")
    try:
        pair.backup.start()
        pair.primary.start()
        report = pair.primary.verb_json("restore", "v", "--lost", "all")
        assert report["missing_bytes"] == 16 << 40
        with NbdClient(pair.socket, "v") as client:
            assert client.read((16 << 40) - 4096, 4096) == bytes(4096)
        process = pair.primary.process
        assert process is not None
        rows = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        (resident,) = [int(row.split()[1]) for row in rows if row.startswith("VmRSS")]
        assert resident < 64 * 1024, f"{resident} KiB resident"
    finally:
        pair.close()


def test_a_chunk_damaged_on_the_way_is_fetched_over_the_link(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (pair.size // 256))
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.lose_disk()
    bundle = pair.bundle(pair.snapshot())
    segment = max(bundle.rglob("*"), key=lambda path: path.stat().st_size)
    with segment.open("r+b") as file:
        file.seek(MIB + 77)
        file.write(b"\x00\x01\x02\x03")
    report = pair.primary.verb_json("merge", bundle, "v", expect=3)
    assert (report["chunks_repaired"], report["chunks_damaged"]) == (1, 0)
    pair.wait_mirrored()
    pair.stop_and_compare()
    assert pair.primary_device.read_bytes() == image.read_bytes()
