"""Images out of bundles as users make them: pipes, disks, streams that stall, places that fill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, PROGRAM, dualrestore, garbage, run, same_bytes
from tests.e2e.test_bad_input_disks import loop, room

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 16 * MIB


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, holes and written zeros."""
    path = tmp_path_factory.mktemp("extract") / "good.img"
    with path.open("wb") as file:
        file.write(os.urandom(6 * MIB) + bytes(MIB))
        file.truncate(SIZE)
        file.seek(12 * MIB)
        file.write(os.urandom(3 * MIB))
    return path


@pytest.fixture(scope="module")
def bundle(image: Path) -> Path:
    """Of it."""
    path = image.with_name("bundle")
    dualrestore("bundle", "create", image, "--to", path)
    return path


@pytest.fixture(scope="module")
def tar(bundle: Path) -> Path:
    """The same as a tar."""
    path = bundle.with_name("b.tar")
    run(["tar", "--sort=name", "-cf", path, "-C", bundle, "."])
    return path


def shell(script: str, **places: Path) -> subprocess.CompletedProcess[str]:
    """Runs a pipe line that fails if a part of it does."""
    environment = {**os.environ, "DR": str(PROGRAM), **{k: str(v) for k, v in places.items()}}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_qcow2_image_through_a_pipe_is_the_image_to_qemu(
    image: Path, bundle: Path, tmp_path: Path
) -> None:
    script = '"$DR" bundle extract "$bundle" --format qcow2 --to - --json | cat > "$out"'
    out = tmp_path / "x.qcow2"
    done = shell(script, bundle=bundle, out=out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr)["bytes_output"] == out.stat().st_size
    run(["qemu-img", "check", "-q", out])
    run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", image, out])


def test_a_tar_from_a_pipe_becomes_a_raw_image_and_no_qcow2_one(
    image: Path, tar: Path, tmp_path: Path
) -> None:
    for script in (
        'cat "$tar" | "$DR" bundle extract - --to "$out"',
        'cat "$tar" | "$DR" bundle extract - --to - > "$out"',
    ):
        out = tmp_path / "raw.img"
        done = shell(script, tar=tar, out=out)
        assert done.returncode == 0, done.stderr
        assert same_bytes(image, out)
        out.unlink()
    refused = shell(
        'cat "$tar" | "$DR" bundle extract - --format qcow2 --to "$out"', tar=tar, out=out
    )
    assert refused.returncode == 2
    assert "gone through twice" in refused.stderr
    assert not out.exists()


def test_a_tar_that_is_cut_off_is_no_image_unless_a_part_will_do(
    image: Path, tar: Path, tmp_path: Path
) -> None:
    out = tmp_path / "raw.img"
    script = 'head -c 4000000 "$tar" | "$DR" bundle extract - --json --to "$out"'
    refused = shell(script, tar=tar, out=out)
    assert refused.returncode == 5
    assert "cut off" in refused.stderr
    assert not out.exists()
    partly = shell(script + " --partial", tar=tar, out=out)
    assert partly.returncode == 3
    told = json.loads(partly.stdout)
    assert told["shortfall"] is not None
    [[first, length]] = told["absent"]
    assert (first + length, told["bytes_absent"]) == (SIZE, length)
    assert out.stat().st_size == SIZE
    assert out.read_bytes()[:first] == image.read_bytes()[:first]


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_reader_that_goes_away_is_named(bundle: Path, form: str) -> None:
    script = (
        '"$DR" bundle extract "$bundle" --to - --format ' + form + " | head -c 1000 > /dev/null"
    )
    done = shell(script, bundle=bundle)
    assert done.returncode == 1
    assert "reads our output has ended" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_sink_that_is_full_is_named(bundle: Path, form: str) -> None:
    done = dualrestore("bundle", "extract", bundle, "--to", "/dev/full", "--format", form, expect=1)
    assert "/dev/full" in done.stderr
    assert "No space left" in done.stderr


@pytest.mark.parametrize("waits_for", ["reader", "writer"])
def test_waiting_for_the_other_side_ends_with_a_signal_and_leaves_no_file(
    bundle: Path, tar: Path, tmp_path: Path, waits_for: str
) -> None:
    reading, writing = os.pipe()
    out = tmp_path / "raw.img"
    words: list[str | Path] = [PROGRAM, "bundle", "extract"]
    words += [bundle, "--to", "-"] if waits_for == "reader" else ["-", "--to", out]
    waiting = subprocess.Popen(
        words,
        stdin=reading if waits_for == "writer" else subprocess.DEVNULL,
        stdout=writing if waits_for == "reader" else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if waits_for == "writer":
        with tar.open("rb") as file:
            left = memoryview(file.read(3 * MIB))
        while left:
            left = left[os.write(writing, left) :]
        deadline = time.monotonic() + 30
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert out.exists(), "it was begun"
    else:
        time.sleep(1.0)
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    os.close(reading)
    os.close(writing)
    assert waiting.returncode == 130, said
    assert "Traceback" not in said
    assert not out.exists()


@pytest.mark.root
def test_a_disk_of_other_contents_becomes_the_volume_only_by_force(
    image: Path, bundle: Path, tar: Path, tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    garbage(backing, SIZE + MIB)
    before = backing.read_bytes()
    with loop(backing) as disk:
        refused = dualrestore("bundle", "extract", bundle, "--to", disk, expect=2)
        assert "expected a removable disk" in refused.stderr
        assert disk.read_bytes() == before, "nothing is touched"
        for source in (bundle, tar):
            garbage(backing, SIZE + MIB)
            dualrestore("bundle", "extract", source, "--to", disk, "--force")
            held = disk.read_bytes()
            assert held[:SIZE] == image.read_bytes(), "zeros were written, too"
        assert held[SIZE:] == backing.read_bytes()[SIZE:] != bytes(MIB)
        words: list[str | Path] = ["bundle", "extract", bundle, "--format", "qcow2", "--to", disk]
        dualrestore(*words, "--force")
        run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", image, disk])


@pytest.mark.root
def test_a_disk_that_is_too_small_mounted_or_the_source_itself_is_left_alone(
    bundle: Path, tar: Path, tmp_path: Path
) -> None:
    backing = tmp_path / "disk"
    garbage(backing, 2 * MIB)
    before = backing.read_bytes()
    with loop(backing) as disk:
        for form in ("raw", "qcow2"):
            words: list[str | Path] = ["bundle", "extract", bundle, "--force", "--format", form]
            refused = dualrestore(*words, "--to", disk, expect=2)
            assert "larger one" in refused.stderr
        assert disk.read_bytes() == before
    backing.write_bytes(tar.read_bytes())
    with loop(backing) as disk:
        refused = dualrestore("bundle", "extract", disk, "--force", "--to", disk, expect=2)
        assert "the bundle itself" in refused.stderr
        assert disk.read_bytes()[:SIZE] == tar.read_bytes()[:SIZE]
    with room("ext4", tmp_path / "fs", 8 * MIB) as top:
        mounted = run(["findmnt", "-no", "SOURCE", top]).stdout.strip()
        refused = dualrestore("bundle", "extract", bundle, "--force", "--to", mounted, expect=11)
        assert "mounted" in refused.stderr


@pytest.mark.root
def test_a_file_that_does_not_fit_is_removed(bundle: Path, tmp_path: Path) -> None:
    with room("tmpfs", tmp_path / "small", 4 * MIB) as top:
        for form in ("raw", "qcow2"):
            words: list[str | Path] = ["bundle", "extract", bundle, "--format", form]
            words += ["--to", top / "out"]
            full = dualrestore(*words, expect=1)
            assert "No space left" in full.stderr
            assert list(top.iterdir()) == []
