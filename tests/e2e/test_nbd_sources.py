"""Exports of NBD servers as sources: snapshots of a backup, and what qemu-nbd and nbdkit serve."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.e2e.harness import (
    DIES_WITH_US,
    MIB,
    PROGRAM,
    Pair,
    dualrestore,
    free_port,
    garbage,
    run,
    same_bytes,
    wait_until,
)
from tests.e2e.pki import set_tls, write_pki
from tests.e2e.workload import Workload, check_volume, prepared

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 16 * MIB
OTHER = "00000000-0000-0000-0000-000000000099"


@contextlib.contextmanager
def serving(place: Path, *words: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server until it is left, once it listens at the Unix socket."""
    with subprocess.Popen([*DIES_WITH_US, *words], stdout=subprocess.DEVNULL) as server:
        try:
            with socket.socket(socket.AF_UNIX) as probe:
                wait_until("it listens", lambda: probe.connect_ex(str(place)) == 0)
            yield server
        finally:
            server.kill()
            place.unlink(missing_ok=True)


class Lost:
    """A file of random bytes, and a map in which all of it is missing."""

    def __init__(self, place: Path, *options: str, size: int = SIZE) -> None:
        self.path, self.map, self.size = place / "lost.img", place / "lost.map", size
        garbage(self.path, size)
        self.map.unlink(missing_ok=True)
        dualrestore("map", "create", self.map, "--size", str(size), *options)

    def merge(self, *sources: str | Path, expect: int = 0) -> dict[str, Any]:
        """What is told of the merge."""
        words = ("merge", *sources, self.path, "--map", self.map, "--json")
        done = dualrestore(*words, expect=expect)
        assert "Traceback" not in done.stderr
        told: dict[str, Any] = json.loads(done.stdout or done.stderr)
        return told

    def shown(self) -> dict[str, Any]:
        """What the map holds."""
        told: dict[str, Any] = json.loads(dualrestore("map", "show", self.map, "--json").stdout)
        return told


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data and holes."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for begin in (0, 9 * MIB):
            file.seek(begin)
            file.write(os.urandom(5 * MIB))
    return path


def test_a_snapshot_of_a_backup_fills_a_replica_and_a_volume_under_load(
    seed: int, tmp_path: Path
) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        snapshot = pair.snapshot()
        uri = pair.snapshot_uri(snapshot)
        workload = Workload(pair, shadow)
        workload.start()
        workload.wait_for_writes(50)
        report = pair.primary.verb_json("merge", uri, "v")
        assert report["bytes_written"] > 0
        assert report["sources"][0]["source"] == uri
        assert pair.primary.status()["missing_bytes"] == 0
        workload.finish()
        replica = Lost(tmp_path)
        assert replica.merge(uri)["bytes_written"] == SIZE
        run(["nbdcopy", uri, tmp_path / "cut.img"])
        assert same_bytes(replica.path, tmp_path / "cut.img")
        volume = pair.primary.status()["volume"]
        assert replica.shown()["volume"] == volume
        refused = Lost(tmp_path, "--volume", OTHER).merge(uri, expect=5)
        assert f"found volume {volume}" in refused["error"]["message"]
        for other, code, words in (
            (pair.uri, 5, "names none"),
            (pair.snapshot_uri(OTHER), 2, "nbdinfo --list"),
        ):
            assert words in pair.primary.verb("merge", other, "v", expect=code).stderr
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_of_a_snapshot_of_a_part_only_that_part_is_taken(pair: Pair, tmp_path: Path) -> None:
    run(["qemu-io", "-f", "raw", "-c", "write -P 7 0 32M", "-c", "flush", pair.uri])
    pair.wait_mirrored()
    words = ("snapshot", "v", "--select", "4MiB-6MiB", "--select", "9MiB-10MiB")
    snapshot = str(pair.primary.verb_json(*words)["snapshot"])
    replica = Lost(tmp_path, size=pair.size)
    before = replica.path.read_bytes()
    assert replica.merge(pair.snapshot_uri(snapshot))["bytes_written"] == 3 * MIB
    found = replica.path.read_bytes()
    assert found[4 * MIB : 6 * MIB] == bytes([7]) * (2 * MIB)
    assert found[9 * MIB : 10 * MIB] == bytes([7]) * MIB
    for start, end in ((0, 4), (6, 9), (10, 32)):
        assert found[start * MIB : end * MIB] == before[start * MIB : end * MIB]
    assert replica.shown()["missing_bytes"] == pair.size - 3 * MIB


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("qemu-nbd", ["-f", "raw", "-r", "-t", "-k"]),
        ("nbdkit", ["-f", "file", "-U"]),
        ("nbdkit", ["-f", "--no-sr", "file", "-U"]),
        (
            "nbdkit",
            [
                *("-f", "--filter=blocksize-policy", "file", "blocksize-minimum=64K"),
                *("blocksize-preferred=64K", "blocksize-maximum=256K", "-U"),
            ],
        ),
    ],
)
def test_what_others_serve_is_merged_and_made_a_bundle_of(
    image: Path, tmp_path: Path, program: str, words: list[str]
) -> None:
    place = tmp_path / "socket"
    uri = f"nbd+unix:///?socket={place}"
    with serving(place, program, *words, place, image):
        target = Lost(tmp_path)
        told = target.merge(uri)
        assert same_bytes(target.path, image)
        holes = told["bytes_written"] - told["bytes_read"]
        assert holes == (0 if "--no-sr" in words else 6 * MIB), "known from block status, or not"
        dualrestore("bundle", "create", uri, "--to", tmp_path / "bundle")
    target = Lost(tmp_path)
    target.merge(tmp_path / "bundle")
    assert same_bytes(target.path, image)


def test_a_server_that_dies_is_gone_on_with_and_what_came_beside_it_is_kept(
    image: Path, tmp_path: Path
) -> None:
    place = tmp_path / "socket"
    uri = f"nbd+unix:///?socket={place}"
    part = tmp_path / "part"
    dualrestore("bundle", "create", image, "--to", part, "--select", "0-2MiB")
    target = Lost(tmp_path)
    slow = ("nbdkit", "-f", "--filter=rate", "-U", place, "file", image, "rate=32M")
    with serving(place, *slow) as server:
        merge = ("merge", uri, part, target.path, "--map", target.map, "--json")
        words = [str(PROGRAM), *map(str, merge)]
        merging = subprocess.Popen(words, stdout=-1, stderr=-1, text=True)
        before = target.path.read_bytes()
        wait_until(
            "something came", lambda: target.path.read_bytes()[3 * MIB :] != before[3 * MIB :]
        )
        server.kill()
        said, complained = merging.communicate(timeout=60)
    assert merging.returncode == 7, complained
    report = json.loads(said)
    errors = [one["error"] and one["error"]["kind"] for one in report["sources"]]
    assert errors == ["LinkError", None]
    assert report["chunks_damaged"] == 0, "a lost connection is no damage"
    assert "1 of 2 sources were merged whole" in json.loads(complained)["error"]["message"]
    missing = target.shown()["missing_bytes"]
    assert 0 < missing <= SIZE - 2 * MIB
    with serving(place, *slow[:-1], "rate=1G"):
        assert target.merge(uri)["bytes_written"] == missing
    assert same_bytes(target.path, image)


def test_an_export_over_tls_is_read_and_one_in_the_clear_from_elsewhere_is_not(
    image: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    pki = write_pki(tmp_path / "pki", authority, authority)
    stranger = write_pki(tmp_path / "stranger", trustme.CA(), authority)
    place = tmp_path / "socket"
    encrypted = ("nbdkit", "-f", "--tls=require", f"--tls-certificates={pki}", "--tls-verify-peer")
    uri = f"nbds+unix:///?socket={place}&tls-hostname=localhost&tls-certificates="
    with serving(place, *encrypted, "-U", place, "file", image):
        target = Lost(tmp_path)
        target.merge(f"{uri}{pki}")
        assert same_bytes(target.path, image)
        again = Lost(tmp_path)
        refused = again.merge(f"{uri}{pki}".replace("localhost", "example.org"), expect=7)
        assert "no TLS" in refused["error"]["message"]
        again.merge(f"{uri}{stranger}", expect=7)
        refused = again.merge(f"nbd+unix:///?socket={place}", expect=2)
        assert "nbds" in refused["error"]["message"]
        refused = again.merge(f"nbds+unix:///?socket={place}", expect=2)
        assert "tls-certificates" in refused["error"]["message"]
        assert again.shown()["current_bytes"] == 0
    with serving(place, "nbdkit", "-f", "-U", place, "file", image):
        refused = again.merge(f"{uri}{pki}", expect=2)
        assert "it refuses" in refused["error"]["message"]
    refused = again.merge("nbd://192.0.2.1/db", expect=2)
    assert "expected TLS to another machine" in refused["error"]["message"]
    assert again.shown()["current_bytes"] == 0


def test_a_daemon_reads_a_snapshot_over_tls_with_the_certificates_of_its_node(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    port = free_port()
    pair = Pair(8 * MIB)
    try:
        for daemon, name in ((pair.backup, "backup-pki"), (pair.primary, "pki")):
            set_tls(daemon, write_pki(pair.directory / name, authority, authority))
        text = pair.backup.configuration.read_text()
        exports = f'export = ["tcp:0.0.0.0:{port}", '
        pair.backup.configuration.write_text(text.replace("export = [", exports))
        pair.backup.start()
        pair.primary.start()
        run(["qemu-io", "-f", "raw", "-c", "write -P 5 0 8M", "-c", "flush", pair.uri])
        pair.wait_mirrored()
        pair.lose_disk()
        uri = f"nbds://127.0.0.1:{port}/v@{pair.snapshot()}"
        assert pair.primary.verb_json("merge", uri, "v")["bytes_written"] == 8 * MIB
        replica = Lost(tmp_path, size=8 * MIB)
        replica.merge(f"{uri}?tls-certificates={pair.directory}/pki")
        assert replica.path.read_bytes() == bytes([5]) * (8 * MIB)
        pair.wait_mirrored()
        pair.stop_and_compare()
    finally:
        pair.close()
