"""Bad input, each a clear error with the right exit code, and nothing touched."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, PROGRAM, Daemon, Pair, dualrestore, free_port, run

if TYPE_CHECKING:
    from pathlib import Path

USAGE, WRONG, BUSY = 2, 5, 11
SIZE = 4 * MIB


def refused(*words: str | Path, code: int | None, says: str = "") -> str:
    """Runs a verb that must fail with the code and in words; what it said."""
    finished = dualrestore(*words, expect=None)
    said = finished.stderr + finished.stdout
    assert finished.returncode != 0, f"accepted: {words}"
    assert finished.returncode == (code or finished.returncode), f"{finished.returncode}: {said}"
    assert "Traceback" not in said, said
    assert finished.stderr.strip(), "no word on standard error"
    assert says.lower() in said.lower(), said
    return said


class Files:
    """A bundle, a target with a map, and copies to compare with."""

    def __init__(self, top: Path) -> None:
        self.good = top / "good.img"
        self.target = top / "target.img"
        self.map = top / "over.map"
        self.bundle = top / "bundle"
        self.good.write_bytes(bytes(range(1, 256)) * (SIZE // 255 + 1))
        with self.good.open("r+b") as file:
            file.truncate(SIZE)
        self.target.write_bytes(b"\xee" * SIZE)
        dualrestore("map", "create", self.map, "--size", str(SIZE))
        dualrestore("bundle", "create", self.good, "--to", self.bundle)

    def merge_refused(self, *, code: int | None, says: str = "") -> str:
        """The merge is refused, and not a byte of the target has changed."""
        said = refused("merge", self.bundle, self.target, "--map", self.map, code=code, says=says)
        assert self.target.read_bytes() == b"\xee" * SIZE, "refused, and yet it wrote"
        return said

    def segment(self) -> Path:
        """The largest file of the bundle."""
        return max(self.bundle.rglob("*"), key=lambda path: path.stat().st_size)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Fresh files, all fitting each other."""
    return Files(tmp_path)


def patch(path: Path, offset: int, content: bytes) -> None:
    """Overwrites bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_map_of_another_size_is_refused(files: Files) -> None:
    files.map.unlink()
    dualrestore("map", "create", files.map, "--size", str(SIZE * 2))
    files.merge_refused(code=WRONG)


def test_a_target_that_is_too_small_is_refused(files: Files) -> None:
    with files.target.open("r+b") as file:
        file.truncate(SIZE - 4096)
    refused("merge", files.bundle, files.target, "--map", files.map, code=None)
    assert files.target.read_bytes() == b"\xee" * (SIZE - 4096)


@pytest.mark.parametrize("length", [0, 1, 511, 4095, 4096])
def test_a_truncated_map_is_refused(files: Files, length: int) -> None:
    with files.map.open("r+b") as file:
        file.truncate(length)
    files.merge_refused(code=WRONG)


def test_a_map_with_a_wrong_magic_or_an_unknown_version_is_refused(files: Files) -> None:
    whole = files.map.read_bytes()[:64]
    for wrong in (b"NOTAMAP!", whole[:8] + b"\xff\xff\xff\xff"):
        # Both slots: while one header is whole, the other may rot.
        for slot in (0, 4096):
            patch(files.map, slot, wrong)
        files.merge_refused(code=WRONG)


def test_a_bundle_without_its_manifest_or_with_half_of_it_is_refused(files: Files) -> None:
    manifest = files.bundle / "manifest.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text[: len(text) // 2])
    files.merge_refused(code=None)
    for path in files.bundle.glob("manifest*.json"):
        path.unlink()
    files.merge_refused(code=None)


def test_a_damaged_chunk_is_never_written_and_the_exit_code_says_so(files: Files) -> None:
    patch(files.segment(), MIB + 77, b"\x00\x01\x02\x03")
    refused("bundle", "verify", files.bundle, code=None)
    finished = dualrestore(
        "merge", files.bundle, files.target, "--map", files.map, "--json", expect=3
    )
    report = json.loads(finished.stdout)
    assert report["chunks_damaged"] == 1, report
    good, target = files.good.read_bytes(), files.target.read_bytes()
    for offset in range(0, SIZE, 4096):
        block = target[offset : offset + 4096]
        assert block in {good[offset : offset + 4096], b"\xee" * 4096}, f"garbage at {offset}"


def test_a_second_merge_succeeds_and_writes_nothing(files: Files) -> None:
    words = ("merge", files.bundle, files.target, "--map", files.map, "--json")
    assert json.loads(dualrestore(*words).stdout)["bytes_written"] == SIZE
    again = json.loads(dualrestore(*words).stdout)
    assert (again["bytes_written"], again["bytes_skipped"]) == (0, SIZE)


@pytest.mark.parametrize("size", ["0", "1000", "4097", "nonsense", "-4096", "9EiB"])
def test_a_size_that_is_no_multiple_of_a_sector_is_refused(tmp_path: Path, size: str) -> None:
    refused("map", "create", tmp_path / "m", f"--size={size}", code=USAGE)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("block", ["0", "256", "3000", "4097", "2MiB"])
def test_a_block_size_that_is_no_power_of_two_in_range_is_refused(
    tmp_path: Path, block: str
) -> None:
    refused("map", "create", tmp_path / "m", "--size=1MiB", f"--block-size={block}", code=USAGE)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("marked", ["0-8MiB", "4MiB-4100KiB", "2MiB-1MiB", "x-y", "512-4096"])
def test_a_range_outside_the_volume_is_refused(files: Files, marked: str) -> None:
    refused("map", "mark", files.map, marked, code=USAGE)
    shown = json.loads(dualrestore("map", "show", files.map, "--json").stdout)
    assert shown["current_bytes"] == 0


def test_what_is_not_there_is_named(tmp_path: Path, files: Files) -> None:
    nowhere = tmp_path / "nowhere"
    refused("merge", nowhere, files.target, "--map", files.map, code=None, says="nowhere")
    refused("bundle", "create", nowhere, "--to", tmp_path / "b", code=None, says="nowhere")
    refused("map", "show", nowhere, code=None, says="nowhere")
    refused("-c", nowhere, "status", code=None, says="nowhere")


def serve_refused(configuration: Path, *, code: int | None = None, says: str = "") -> str:
    """`serve` ends by itself, in words."""
    finished = subprocess.run(
        [PROGRAM, "serve", "-c", configuration],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = finished.stderr + finished.stdout
    assert finished.returncode != 0, said
    assert "Traceback" not in said, said
    assert finished.returncode == (code or finished.returncode), f"{finished.returncode}: {said}"
    assert says.lower() in said.lower(), said
    return said


def configuration(top: Path, text: str, **more: str) -> Path:
    """A configuration of one volume, with other words put in."""
    words = {
        "state": str(top / "state"),
        "control": str(top / "c.sock"),
        "listen": f"127.0.0.1:{free_port()}",
        "device": str(top / "disk.img"),
    } | more
    path = top / "x.toml"
    path.write_text(text.format(**words))
    return path


BACKUP = """[node]
state = "{state}"
control = "{control}"
listen = "{listen}"
[volume.v]
role = "backup"
device = "{device}"
"""


def test_an_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = configuration(tmp_path, BACKUP + 'sise = "4MiB"\n')
    assert "size" in serve_refused(path, code=USAGE, says="sise")


def test_a_missing_a_small_and_a_read_only_device_are_refused(tmp_path: Path) -> None:
    serve_refused(configuration(tmp_path, BACKUP), says="disk.img")
    small = tmp_path / "disk.img"
    small.write_bytes(bytes(MIB))
    serve_refused(configuration(tmp_path, BACKUP + 'size = "4MiB"\n'), says="disk.img")
    assert small.stat().st_size == MIB, "refused, and yet it grew"
    fixed = tmp_path / "proc"
    fixed.symlink_to("/proc/version")
    serve_refused(configuration(tmp_path, BACKUP, device=str(fixed)))


def test_a_backup_on_a_reachable_address_without_tls_is_refused(tmp_path: Path) -> None:
    path = configuration(tmp_path, BACKUP + 'size = "4MiB"\n', listen=f"0.0.0.0:{free_port()}")
    serve_refused(path, code=USAGE, says="tls")


def test_an_address_and_a_device_in_use_are_refused(pair: Pair) -> None:
    other = Pair(pair.size)
    try:
        text = other.backup.configuration.read_text()
        other.backup.configuration.write_text(
            text.replace(str(other.link_port), str(pair.link_port))
        )
        serve_refused(other.backup.configuration, says=str(pair.link_port))
        other.backup.configuration.write_text(
            text.replace(str(other.mirror_device), str(pair.mirror_device))
        )
        serve_refused(other.backup.configuration, code=BUSY, says="mirror.img")
    finally:
        other.close()
    pair.primary.verb("verify", "v")


def test_a_device_replaced_by_one_of_another_size_is_refused(pair: Pair) -> None:
    pair.primary.stop()
    with pair.primary_device.open("r+b") as file:
        file.truncate(pair.size // 2)
    assert pair.primary_device.name in serve_refused(pair.primary.configuration)


def test_a_bundle_of_another_volume_or_before_the_loss_is_refused(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(b"\x21" * pair.size)
    run(["nbdcopy", image, pair.uri])
    stale = pair.bundle(pair.snapshot(), "stale")
    pair.lose_disk()
    with Pair(pair.size) as other:
        foreign = other.bundle(other.snapshot(), "foreign")
        before = pair.primary.status()["missing_bytes"]
        assert "Traceback" not in pair.primary.verb("merge", foreign, "v", expect=WRONG).stderr
        # Without the backup nobody vouches for what is from before the loss.
        pair.backup.stop()
        assert "Traceback" not in pair.primary.verb("merge", stale, "v", expect=WRONG).stderr
        assert pair.primary.status()["missing_bytes"] == before


def test_a_state_directory_of_another_volume_is_refused(pair: Pair) -> None:
    with Pair(pair.size) as other:
        other.primary.stop()
        pair.primary.stop()
        state = pair.directory / "primary-state"
        shutil.rmtree(state)
        shutil.copytree(other.directory / "primary-state", state)
        pair.primary.launch()
        assert pair.primary.process is not None
        # It may refuse to start, or start and refuse the backup; it may not mirror.
        try:
            pair.primary.process.wait(3)
        except subprocess.TimeoutExpired:
            status = pair.primary.status()
            assert not status["mirrored"], status
            assert not status["backups"][0]["connected"], status
    assert pair.backup.alive


def test_a_primary_with_its_backup_unreachable_serves_what_it_has(pair: Pair) -> None:
    run(["qemu-io", "-f", "raw", "-c", "write -P 3 0 1M", "-c", "flush", pair.uri])
    pair.primary.stop()
    pair.backup.stop()
    pair.primary.start()
    run(["qemu-io", "-f", "raw", "-c", "read -P 3 0 1M", "-c", "write -P 4 1M 1M", pair.uri])
    assert pair.primary.status()["unsent_bytes"] >= MIB
    pair.backup.start()
    pair.wait_mirrored()


def test_a_link_to_a_volume_of_the_wrong_role_or_name_is_refused_in_words(pair: Pair) -> None:
    pair.primary.stop()
    text = pair.primary.configuration.read_text()
    pair.primary.configuration.write_text(
        text.replace(f"{pair.link_port}/v", f"{pair.link_port}/w")
    )
    pair.primary.start()
    status = pair.primary.status()
    assert not status["backups"][0]["connected"], status


def test_verbs_without_a_daemon_say_that_none_answers(tmp_path: Path) -> None:
    path = configuration(tmp_path, BACKUP + 'size = "4MiB"\n')
    daemon = Daemon(path)
    for words in (["status"], ["verify", "v"], ["restore", "v", "--lost", "all"]):
        finished = daemon.verb(*words, expect=None)
        assert finished.returncode != 0
        assert "Traceback" not in finished.stderr
        assert "c.sock" in finished.stderr, finished.stderr
