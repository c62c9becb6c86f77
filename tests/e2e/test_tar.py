"""Bundles as tars, as users make them: pipes, GNU tar, files cut off, readers that go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, PROGRAM, dualrestore, garbage, run, same_bytes
from tests.e2e.test_bad_input_disks import loop

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 32 * MIB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, holes and written zeros."""
    path = tmp_path_factory.mktemp("tar") / "good.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for begin in range(0, SIZE, 16 * MIB):
            file.seek(begin)
            file.write(os.urandom(13 * MIB) + bytes(MIB))
    return path


@pytest.fixture(scope="module")
def tar(image: Path) -> Path:
    """Its bundle as a tar, made through a pipe of 64 KiB."""
    path = image.with_name("bundle.tar")
    made = piped([PROGRAM, "bundle", "create", image, "--to", "-", "--json"], ["cat"], path)
    assert json.loads(made)["path"] == "-"
    return path


def piped(writer: list[str | Path], reader: list[str | Path], output: Path) -> str:
    """Runs two programs with a pipe between them; what the first said on standard error."""
    with output.open("wb") as file:
        first = subprocess.Popen(writer, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        second = subprocess.Popen(reader, stdin=first.stdout, stdout=file)
        assert first.stdout is not None
        first.stdout.close()
        _, said = first.communicate(timeout=120)
        assert second.wait(timeout=120) == 0
    assert first.returncode == 0, said
    return said.decode()


def lost(place: Path) -> tuple[Path, Path]:
    """A disk of random bytes and a map in which all is missing."""
    target, overwrite_map = place / "target.img", place / "over.map"
    garbage(target, SIZE)
    overwrite_map.unlink(missing_ok=True)
    dualrestore("map", "create", overwrite_map, "--size", str(SIZE))
    return target, overwrite_map


def merge_from(
    file: Path, target: Path, overwrite_map: Path, *, length: int | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Merges the first bytes of a file through a pipe."""
    head = ["head", "-c", str(file.stat().st_size if length is None else length), str(file)]
    with subprocess.Popen(head, stdout=subprocess.PIPE) as source:
        return subprocess.run(
            [PROGRAM, "merge", "-", target, "--map", overwrite_map, "--json"],
            stdin=source.stdout,
            capture_output=True,
            check=False,
            timeout=120,
        )


def test_a_tar_goes_through_a_pipe_and_is_read_by_others(
    image: Path, tar: Path, tmp_path: Path
) -> None:
    target, overwrite_map = lost(tmp_path)
    merged = merge_from(tar, target, overwrite_map)
    assert merged.returncode == 0, merged.stderr
    assert same_bytes(image, target)
    names = run(["tar", "tf", tar]).stdout.split()
    with tarfile.open(tar) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == names
    assert all(member.offset_data % 4096 == 0 for member in members)
    (tmp_path / "out").mkdir()
    run(["tar", "xf", tar, "-C", tmp_path / "out"])
    dualrestore("bundle", "verify", tmp_path / "out")
    run(["python3", "-I", tmp_path / "out/recover.py", tmp_path / "out", tmp_path / "r.img"])
    assert same_bytes(image, tmp_path / "r.img")


@pytest.mark.parametrize("form", ["gnu", "ustar", "pax"])
def test_a_tar_of_a_bundle_directory_is_read_from_a_pipe_and_a_file(
    image: Path, tmp_path: Path, form: str
) -> None:
    directory = tmp_path / "db.drb"
    dualrestore("bundle", "create", image, "--to", directory)
    made = tmp_path / "made.tar"
    order = ["--sort=name"] if form == "pax" else []
    run(["tar", f"--format={form}", *order, "-cf", made, "-C", tmp_path, "./db.drb"])
    target, overwrite_map = lost(tmp_path)
    merged = merge_from(made, target, overwrite_map)
    assert merged.returncode == 0, merged.stderr
    assert same_bytes(image, target)
    dualrestore("bundle", "verify", made)
    shown = json.loads(dualrestore("bundle", "show", made, "--json").stdout)
    assert shown["size"] == SIZE
    target, overwrite_map = lost(tmp_path)
    dualrestore("merge", made, target, "--map", overwrite_map)
    assert same_bytes(image, target)


def test_a_sparse_tar_and_links_are_refused(image: Path, tmp_path: Path) -> None:
    directory = tmp_path / "db.drb"
    dualrestore("bundle", "create", image, "--to", directory)
    (tmp_path / "seg").write_bytes(bytes(MIB))
    segment = next(directory.glob("seg-*"))
    segment.rename(tmp_path / "moved")
    segment.symlink_to(tmp_path / "moved")
    target, overwrite_map = lost(tmp_path)
    made = tmp_path / "made.tar"
    run(["tar", "-cf", made, "-C", tmp_path, "db.drb"])
    before = target.read_bytes()
    refused = merge_from(made, target, overwrite_map)
    assert refused.returncode == 5
    assert b"symbolic link" in refused.stderr
    assert target.read_bytes() == before


def test_a_tar_that_is_cut_off_is_gone_on_with(image: Path, tar: Path, tmp_path: Path) -> None:
    target, overwrite_map = lost(tmp_path)
    half = tar.stat().st_size // 2
    merged = merge_from(tar, target, overwrite_map, length=half)
    assert merged.returncode == 1
    report = json.loads(merged.stdout)
    assert "cut off" in report["shortfall"]
    assert 0 < report["bytes_written"] < SIZE
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:half])
    again = dualrestore("merge", cut, target, "--map", overwrite_map, "--json", expect=1)
    assert json.loads(again.stdout)["bytes_written"] == 0
    merged = merge_from(tar, target, overwrite_map)
    assert merged.returncode == 0
    assert json.loads(merged.stdout)["bytes_skipped"] == report["bytes_written"]
    assert same_bytes(image, target)


def test_a_damaged_chunk_of_a_stream_stays_missing(image: Path, tar: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tar"
    held = bytearray(tar.read_bytes())
    held[8 * MIB] ^= 1
    bad.write_bytes(held)
    target, overwrite_map = lost(tmp_path)
    before = target.read_bytes()
    merged = merge_from(bad, target, overwrite_map)
    assert merged.returncode == 3
    report = json.loads(merged.stdout)
    assert (report["chunks_damaged"], report["shortfall"]) == (1, None)
    found, expected = target.read_bytes(), image.read_bytes()
    wrong = [at for at in range(0, SIZE, 4096) if found[at : at + 4096] != expected[at : at + 4096]]
    assert 0 < len(wrong) <= 256
    assert all(found[at : at + 4096] == before[at : at + 4096] for at in wrong)


def test_a_reader_that_goes_away_is_named(image: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, "bundle", "create", image, "--to", "-"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stderr is not None
        writer.stdout.read(1000)
        writer.stdout.close()
        said = writer.stderr.read().decode()
        assert writer.wait(timeout=60) == 1
    assert "reads our output has ended" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", ["create", "merge"])
def test_waiting_for_the_other_side_of_a_pipe_ends_with_a_signal(
    image: Path, tar: Path, tmp_path: Path, verb: str
) -> None:
    reading, writing = os.pipe()
    target, overwrite_map = lost(tmp_path)
    verbs: dict[str, list[str | Path]] = {
        "create": [PROGRAM, "bundle", "create", image, "--to", "-"],
        "merge": [PROGRAM, "merge", "-", target, "--map", overwrite_map],
    }
    words = verbs[verb]
    waiting = subprocess.Popen(
        words,
        stdin=reading if verb == "merge" else subprocess.DEVNULL,
        stdout=writing if verb == "create" else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if verb == "merge":
        with tar.open("rb") as file:
            os.write(writing, file.read(32 << 10))
    time.sleep(1.5)
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    os.close(reading)
    os.close(writing)
    assert waiting.returncode == 130, said
    assert "Traceback" not in said


def test_standard_input_that_is_no_tar_is_refused(tmp_path: Path, tar: Path) -> None:
    target, overwrite_map = lost(tmp_path)
    packed = tmp_path / "packed"
    with packed.open("wb") as file:
        subprocess.run(["gzip", "-1c", str(tar)], stdout=file, check=True)
    refused = merge_from(packed, target, overwrite_map)
    assert refused.returncode == 5
    assert b"gzip -dc" in refused.stderr


def test_a_failed_tar_file_leaves_nothing_and_an_old_one_is_kept(
    image: Path, tar: Path, tmp_path: Path
) -> None:
    refused = dualrestore("bundle", "create", image, "--to", tar, expect=2)
    assert "exists" in refused.stderr
    made = tmp_path / "made.tar"
    dualrestore("bundle", "create", image, "--to", made, "--select", "0-1MiB")
    dualrestore("bundle", "verify", made)
    dualrestore("bundle", "create", image, "--to", tmp_path / "x.tar", "--select", "1-2", expect=2)
    assert not (tmp_path / "x.tar").exists()


def test_an_encrypted_tar_opens_with_its_key_from_a_file_and_through_a_pipe(
    image: Path, tmp_path: Path
) -> None:
    right, wrong = tmp_path / "right.txt", tmp_path / "wrong.txt"
    for identity in (right, wrong):
        run(["age-keygen", "-o", identity])
    recipient = run(["age-keygen", "-y", right]).stdout.strip()
    tar = tmp_path / "secret.tar"
    words = ["--to", "-", "--recipient", recipient]
    piped([PROGRAM, "bundle", "create", image, *words], ["cat"], tar)
    assert image.read_bytes()[:4096] not in tar.read_bytes()

    def merged(source: str | Path, *options: str | Path) -> tuple[int, Path]:
        target, overwrite_map = lost(tmp_path)
        with tar.open("rb") as file, subprocess.Popen(["cat"], stdin=file, stdout=-1) as pipe:
            words = [PROGRAM, "merge", source, target, "--map", overwrite_map, *options]
            done = subprocess.run(words, stdin=pipe.stdout, capture_output=True, check=False)
        return done.returncode, target

    for source in (tar, "-"):
        code, target = merged(source, "--identity", right)
        assert code == 0
        assert same_bytes(image, target)
        assert merged(source)[0] == 5
        assert merged(source, "--identity", wrong)[0] == 5
        assert merged(source, "--identity", right, "--signers", right)[0] == 5
    dualrestore("bundle", "verify", tar, "--identity", right)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    run(["tar", "xf", tar, "-C", unpacked])
    dualrestore("bundle", "verify", unpacked, "--identity", right)


def test_a_plain_tar_is_refused_where_an_encrypted_one_is_expected(
    tar: Path, tmp_path: Path
) -> None:
    identity = tmp_path / "identity.txt"
    run(["age-keygen", "-o", identity])
    target, overwrite_map = lost(tmp_path)
    before = target.read_bytes()
    words: list[str | Path] = ["merge", tar, target, "--map", overwrite_map]
    dualrestore(*words, "--identity", identity, expect=5)
    words[1] = "-"
    with tar.open("rb") as file, subprocess.Popen(["cat"], stdin=file, stdout=-1) as pipe:
        done = subprocess.run(
            [PROGRAM, *words, "--identity", identity],
            stdin=pipe.stdout,
            capture_output=True,
            check=False,
        )
    assert done.returncode == 5, done.stderr
    assert target.read_bytes() == before


def test_a_tar_that_cannot_be_signed_is_not_begun(image: Path, tmp_path: Path) -> None:
    key, tar = tmp_path / "signing", tmp_path / "signed.tar"
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    dualrestore("bundle", "create", image, "--to", tar, "--sign", key, expect=2)
    assert not tar.exists()


@pytest.mark.root
def test_a_disk_that_is_not_removable_is_written_over_only_by_force(
    image: Path, tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    garbage(backing, 2 * SIZE)
    before = backing.read_bytes()
    with loop(backing) as disk:
        refused = dualrestore("bundle", "create", image, "--to", disk, expect=2)
        assert "expected a removable disk" in refused.stderr
        assert "--force" in refused.stderr
        assert disk.read_bytes() == before, "nothing is touched"
        dualrestore("bundle", "create", image, "--to", disk, "--force")
        target, overwrite_map = lost(tmp_path)
        dualrestore("merge", disk, target, "--map", overwrite_map)
    assert same_bytes(image, target)
