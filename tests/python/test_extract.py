"""Images out of bundles, by the API and the command line, as QEMU reads them."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dualrestore as dr
from dualrestore.cli import run

MIB = 1 << 20
CLUSTER = 64 << 10
SIZE = 6 * MIB + 512


def shape(name: str) -> bytes:
    """The contents of an image."""
    if name == "zero":
        return bytes(4 * MIB)
    if name == "full":
        return os.urandom(4 * MIB)
    if name == "edges":
        # The last block of a cluster, the first of the next, and both around an empty one.
        image = bytearray(8 * CLUSTER)
        for at in (CLUSTER - 4096, CLUSTER, 4 * CLUSTER - 1, 5 * CLUSTER):
            image[at] = 1
        return bytes(image)
    return os.urandom(2 * MIB) + bytes(3 * MIB) + os.urandom(MIB + 512)


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data, zeros, and a tail of one sector."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "image"
    path.write_bytes(shape("mixed"))
    return path


@pytest.fixture
def bundle(image: Path, tmp_path: Path) -> dr.Bundle:
    """Of it."""
    return dr.Bundle.create(image, tmp_path / "bundle")


def damage(bundle: dr.Bundle, at: int = MIB) -> None:
    """Flips a bit in the middle of the first chunk's bytes."""
    with Path(bundle.path, "seg-00000000.drs").open("r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def through_pipe(write: Callable[[int], dr.ExtractReport], output: Path) -> dr.ExtractReport:
    """Gives the writer one end of a pipe; what comes out of the other goes into a file."""
    reading, writing = os.pipe()

    def take() -> None:
        with os.fdopen(reading, "rb") as pipe, output.open("wb") as file:
            shutil.copyfileobj(pipe, file)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        report = write(writing)
    finally:
        os.close(writing)
        thread.join()
    return report


def assert_same_in_qemu(qcow2: Path, raw: Path) -> None:
    """The image has no error, nothing leaked, and the same contents."""
    checked = subprocess.run(
        ["qemu-img", "check", "-f", "qcow2", "--output=json", str(qcow2)],
        capture_output=True,
        check=True,
    )
    told = json.loads(checked.stdout)
    assert {told.get(fault, 0) for fault in ("check-errors", "corruptions", "leaks")} == {0}, told
    assert told["image-end-offset"] == qcow2.stat().st_size
    words = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(raw), str(qcow2)]
    compared = subprocess.run(words, capture_output=True, check=False)
    assert compared.returncode == 0, compared


@pytest.mark.parametrize("name", ["mixed", "zero", "full", "edges"])
@pytest.mark.parametrize("block_size", [4096, 512])
def test_a_qcow2_image_from_a_pipe_is_the_volume_to_qemu(
    tmp_path: Path, name: str, block_size: int
) -> None:
    image, qcow2 = tmp_path / "image", tmp_path / "image.qcow2"
    image.write_bytes(shape(name))
    bundle = dr.Bundle.create(image, tmp_path / "bundle", block_size=block_size)
    report = through_pipe(lambda end: bundle.extract(end, format="qcow2"), qcow2)
    assert report.whole
    assert report.bytes_output == qcow2.stat().st_size
    assert_same_in_qemu(qcow2, image)


def test_a_terabyte_with_little_in_it_takes_little(tmp_path: Path) -> None:
    image, raw, qcow2 = (tmp_path / name for name in ("image", "raw", "qcow2"))
    image.touch()
    os.truncate(image, (1 << 40) + 512)
    with image.open("r+b") as file:
        for at in (0, (1 << 39) + 4096, (1 << 40) - 4096, 1 << 40):
            file.seek(at)
            file.write(os.urandom(512))
    bundle = dr.Bundle.create(image, tmp_path / "bundle")
    assert bundle.extract(raw).whole
    assert bundle.extract(qcow2, format="qcow2").whole
    assert raw.stat().st_size == image.stat().st_size
    assert raw.stat().st_blocks * 512 < MIB
    assert qcow2.stat().st_size < 2 * MIB
    assert_same_in_qemu(qcow2, image)
    assert_same_in_qemu(qcow2, raw)


def test_a_raw_file_is_the_volume_and_as_sparse_as_the_bundle(
    bundle: dr.Bundle, image: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, int]] = []
    report = bundle.extract(tmp_path / "raw", progress=seen.append)
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    assert (tmp_path / "raw").stat().st_blocks * 512 < 4 * MIB
    assert (report.bytes_data, report.bytes_zero) == (3 * MIB + 512, 3 * MIB)
    assert seen[-1]["done_bytes"] == seen[-1]["total_bytes"] == SIZE


def test_a_raw_stream_has_every_byte(bundle: dr.Bundle, image: Path, tmp_path: Path) -> None:
    report = through_pipe(bundle.extract, tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    assert (report.whole, report.bytes_output) == (True, SIZE)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_file_that_exists_is_written_over_only_by_force_and_then_holds_nothing_of_before(
    bundle: dr.Bundle, image: Path, tmp_path: Path, form: str
) -> None:
    target = tmp_path / "there"
    before = os.urandom(SIZE + MIB)
    target.write_bytes(before)
    with pytest.raises(dr.UsageError, match="--force"):
        bundle.extract(target, format=form)
    assert target.read_bytes() == before
    assert bundle.extract(target, format=form, force=True).whole
    if form == "raw":
        assert target.read_bytes() == image.read_bytes()
    else:
        assert_same_in_qemu(target, image)


def test_a_bundle_is_not_written_over_by_its_own_image(bundle: dr.Bundle, tmp_path: Path) -> None:
    tar = tmp_path / "b.tar"
    subprocess.run(["tar", "-cf", tar, "-C", bundle.path, "."], check=True)
    held = tar.read_bytes()
    with pytest.raises(dr.UsageError, match="the bundle itself"):
        dr.Bundle.open(tar).extract(tar, force=True)
    assert tar.read_bytes() == held
    with pytest.raises(dr.UsageError, match="the bundle itself"):
        bundle.extract(Path(bundle.path, "manifest.json"), force=True)
    assert bundle.verify().sound
    assert dr.Bundle.open(tar).extract(tmp_path / "raw").whole


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_damaged_chunk_is_left_out_and_told_as_recover_py_does(
    bundle: dr.Bundle, image: Path, tmp_path: Path, form: str
) -> None:
    damage(bundle)
    target, raw = tmp_path / "out", tmp_path / "recovered"
    report = bundle.extract(target, format=form)
    assert (report.whole, report.chunks_damaged) == (False, 1)
    [(offset, length)] = report.damaged
    assert (report.bytes_damaged, report.bytes_absent) == (length, 0)
    recover = ["python3", "-I", str(Path(bundle.path, "recover.py")), bundle.path, str(raw)]
    assert subprocess.run(recover, capture_output=True, check=False).returncode == 3
    held = raw.read_bytes()
    expected = bytearray(image.read_bytes())
    expected[offset : offset + length] = bytes(length)
    assert held == expected
    if form == "raw":
        assert target.read_bytes() == held
    else:
        assert_same_in_qemu(target, raw)


def test_what_is_not_included_is_refused_or_told(image: Path, tmp_path: Path) -> None:
    selected = [(MIB, MIB), (5 * MIB, MIB + 512)]
    bundle = dr.Bundle.create(image, tmp_path / "part", selected)
    with pytest.raises(dr.UsageError, match="not zero"):
        bundle.extract(tmp_path / "raw")
    assert not (tmp_path / "raw").exists()
    report = bundle.extract(tmp_path / "raw", partial=True)
    assert not report.whole
    assert report.absent == [(0, MIB), (2 * MIB, 3 * MIB)]
    assert report.bytes_absent == 4 * MIB
    held = (tmp_path / "raw").read_bytes()
    assert held[MIB : 2 * MIB] == image.read_bytes()[MIB : 2 * MIB]
    assert held[5 * MIB :] == image.read_bytes()[5 * MIB :]
    assert not any(held[:MIB])


def test_media_in_any_order_and_a_missing_one(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image.write_bytes(os.urandom(12 * MIB))
    media = [str(tmp_path / f"m{number}") for number in (1, 2, 3)]
    begin = ["bundle", "create", str(image), "--medium-size", "5MiB"]
    assert run([*begin, *(word for medium in media for word in ("--to", medium))]) == 0
    one, two, three = (dr.Bundle.open(medium) for medium in media)
    assert three.extract(tmp_path / "raw", media=[one, two, one]).whole
    assert (tmp_path / "raw").read_bytes() == image.read_bytes()
    with pytest.raises(dr.NextMediumError, match=r"media 1, 3 of 3, which lack \d+ bytes"):
        one.extract(tmp_path / "less", media=[three])
    words = ["bundle", "extract", media[1], "--to", str(tmp_path / "less"), "--json"]
    capsys.readouterr()
    assert run(words) == 6
    assert not (tmp_path / "less").exists()
    assert json.loads(capsys.readouterr().err)["error"]["kind"] == "NextMediumError"
    assert run([*words, "--partial"]) == 3
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["whole"], told["path"]) == (False, str(tmp_path / "less"))
    assert told["bytes_data"] + told["bytes_absent"] == told["size"]


def test_media_of_another_bundle_are_refused(
    bundle: dr.Bundle, image: Path, tmp_path: Path
) -> None:
    other = dr.Bundle.create(image, tmp_path / "other")
    with pytest.raises(dr.IdentityError, match="media of one bundle"):
        bundle.extract(tmp_path / "raw", media=[other])
    assert not (tmp_path / "raw").exists()


def test_an_encrypted_bundle_is_extracted_with_its_identity_only(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, qcow2 = str(tmp_path / "locked"), tmp_path / "qcow2"
    identity = tmp_path / "identity.txt"
    subprocess.run(["age-keygen", "-o", identity], capture_output=True, check=True)
    keys = ["age-keygen", "-y", str(identity)]
    recipient = subprocess.run(keys, capture_output=True, text=True, check=True).stdout.strip()
    dr.Bundle.create(image, place, recipients=[recipient])
    words = ["bundle", "extract", place, "--to", str(qcow2), "--format", "qcow2"]
    assert run(words) == 5
    assert "encrypted" in capsys.readouterr().err
    assert not qcow2.exists()
    assert run([*words, "--identity", str(identity)]) == 0
    assert_same_in_qemu(qcow2, image)


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_progress_may_end_an_extraction_that_nobody_reads(bundle: dr.Bundle, form: str) -> None:
    reading, writing = os.pipe()

    def stop(counters: dict[str, int]) -> None:
        assert counters["done_bytes"] < SIZE
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bundle.extract(writing, format=form, progress=stop)
    os.close(reading)
    os.close(writing)


def test_what_makes_no_sense_is_refused(bundle: dr.Bundle, image: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    with pytest.raises(dr.UsageError, match="raw or qcow2"):
        bundle.extract(target, format="vmdk")
    with pytest.raises(dr.UsageError, match="a directory"):
        bundle.extract(tmp_path, force=True)
    with pytest.raises(dr.DeviceError, match="No such file"):
        bundle.extract(tmp_path / "nowhere/new")
    extract = ["bundle", "extract"]
    assert run([*extract, str(tmp_path / "none"), "--to", str(target)]) == 2
    assert run([*extract, str(image), "--to", str(target)]) == 5
    assert run([*extract, bundle.path, "--to", str(target), "--format", "vdi"]) == 2
    assert run([*extract, "--to", str(target)]) == 2
    assert not target.exists()
