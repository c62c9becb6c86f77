"""The store of old contents: what an operator hears of it, and what a bundle does to it."""

from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, Pair, dualrestore, garbage, run, same_bytes, wait_until
from tests.e2e.test_bad_input_disks import small

if TYPE_CHECKING:
    from pathlib import Path


def write(pair: Pair, what: str) -> None:
    run(["qemu-io", "-f", "raw", "-c", what, "-c", "flush", pair.uri])
    pair.wait_mirrored()


def metric(pair: Pair, name: str) -> float:
    lines = pair.backup.raw("/metrics").decode().splitlines()
    [found] = [line for line in lines if line.startswith(f"dualrestore_{name}{{")]
    return float(found.rsplit(" ", 1)[1])


@pytest.mark.root
def test_a_store_that_runs_low_is_told_everywhere_before_a_snapshot_breaks() -> None:
    pair = Pair(16 * MIB)
    with small(pair, pair.directory / "backup-state", 16 * MIB), pair:
        write(pair, "write -P 7 0 16M")
        snapshot = pair.snapshot()
        status = pair.backup.status()
        assert (status["store_low"], status["warnings"]) == (False, [])
        assert metric(pair, "store_low") == 0
        # 12 MiB are free beside the journal; a tenth of 16 is the mark, a sixteenth is kept.
        write(pair, "write -P 8 0 10752k")
        status = pair.backup.status()
        assert status["store_low"]
        [warning] = status["warnings"]
        assert "runs low" in warning
        assert "delete snapshots" in warning
        assert status["snapshots"][0]["broken"] is None, "a warning comes before the harm"
        assert f"WARNING: {warning}" in pair.backup.verb("status").stdout
        assert metric(pair, "store_low") == 1
        assert 0 < metric(pair, "store_free_bytes") < 2 * MIB
        events = pair.backup.raw("/events", until=b"event: warning\n")
        assert b"runs low" in events.rpartition(b"event: warning\n")[2]
        wait_until("it is logged", lambda: "runs low" in pair.backup.words())
        # At the end of its room the snapshot breaks, and the writes go on.
        write(pair, "write -P 9 10M 6M")
        status = pair.backup.status()
        assert not status["store_low"], "there is nothing more to lose"
        [warning] = status["warnings"]
        assert snapshot in warning
        assert "is full" in warning
        counted = 'dualrestore_snapshots{state="broken",volume="v"} 1.0'
        assert counted in pair.backup.raw("/metrics").decode()
        wait_until("it is logged", lambda: f"{snapshot} broke" in pair.backup.words())
        pair.backup.verb("snapshot", "v", "--delete", snapshot)
        assert pair.backup.status()["warnings"] == []
        pair.stop_and_compare()


def test_writes_go_on_at_their_pace_while_nobody_takes_the_bundle(tmp_path: Path) -> None:
    size = 128 * MIB
    with Pair(size) as pair:
        image, pipe, tar = (tmp_path / name for name in ("image", "pipe.tar", "bundle.tar"))
        garbage(image, size)
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        snapshot = pair.snapshot()
        os.mkfifo(pipe)
        # The reader has opened the pipe and takes nothing: the medium stands still.
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        words: list[str | Path] = ["bundle", "create", f"v@{snapshot}", "--to", pipe]
        making = threading.Thread(target=lambda: pair.backup.verb(*words))
        making.start()
        wait_until("the bundle is under way", lambda: pair.backup.ask("/v1/status")["jobs"] != [])
        fio = [
            "fio",
            "--name=w",
            "--ioengine=nbd",
            f"--uri={pair.uri}",
            "--rw=randwrite",
            "--bs=4k",
        ]
        run([*fio, "--iodepth=16", f"--size={size}", "--io_size=16m", "--end_fsync=1"])
        pair.wait_mirrored()
        [job] = pair.backup.ask("/v1/status")["jobs"]
        assert job["state"] == "running"
        assert making.is_alive()
        assert pair.backup.status()["snapshots"][0]["preserved_bytes"] >= 8 * MIB
        # Now the medium takes the rest.
        os.set_blocking(reader, True)
        with os.fdopen(reader, "rb") as source, tar.open("wb") as sink:
            shutil.copyfileobj(source, sink, MIB)
        making.join(60)
        assert not making.is_alive()
        restored, over = tmp_path / "restored", tmp_path / "map"
        restored.touch()
        os.truncate(restored, size)
        dualrestore("map", "create", over, "--size", str(size))
        dualrestore("merge", tar, restored, "--map", over)
        assert same_bytes(restored, image)


def test_a_snapshot_gives_back_what_its_bundle_holds_where_that_is_asked_for() -> None:
    with Pair(16 * MIB) as pair:
        write(pair, "write -P 7 0 16M")
        snapshot = pair.snapshot()
        write(pair, "write -P 8 0 8M")
        bundle = pair.directory / "bundle"
        words = ["bundle", "create", f"v@{snapshot}", "--release", "always", "--to"]
        refused = pair.backup.verb(*words, pair.directory / "b.tar", expect=2)
        assert "expected directories as media" in refused.stderr
        pair.backup.verb(*words, bundle)
        [shown] = pair.backup.status()["snapshots"]
        assert (shown["preserved_bytes"], shown["released_bytes"]) == (0, 16 * MIB)
        assert "16 MiB given back to a bundle" in pair.backup.verb("status").stdout
        refused = pair.backup.verb(*words[:3], "--to", pair.directory / "two", expect=2)
        assert "given back" in refused.stderr
        image = pair.directory / "restored"
        run(["python3", "-I", bundle / "recover.py", bundle, image])
        assert image.read_bytes() == b"\x07" * (16 * MIB)
