"""What a bundle holds as extents and as memory."""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy
import pytest

import dualrestore as dr

MIB = 1 << 20
SIZE = 6 * MIB + 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Data, zeros, text, and a tail of one sector."""
    path = tmp_path / "image"
    path.write_bytes(
        os.urandom(2 * MIB) + bytes(2 * MIB) + b"text" * (MIB // 4) + os.urandom(MIB + 512)
    )
    return path


@pytest.fixture(params=["none", "zstd"])
def bundle(image: Path, tmp_path: Path, request: pytest.FixtureRequest) -> dr.Bundle:
    """Of it, as it is and compressed."""
    return dr.Bundle.create(image, tmp_path / "bundle", compression=request.param)


def test_extents_are_all_of_the_volume_in_order(bundle: dr.Bundle, image: Path) -> None:
    extents = list(bundle.extents())
    assert [tuple(one) for one in extents] == [
        (0, 2 * MIB, "data"),
        (2 * MIB, 2 * MIB, "zero"),
        (4 * MIB, 2 * MIB + 512, "data"),
    ]
    assert all(one.end == other.offset for one, other in pairwise(extents))


def test_what_was_not_selected_is_in_no_extent(image: Path, tmp_path: Path) -> None:
    selected = [(4096, 8192), (3 * MIB, 4096)]
    bundle = dr.Bundle.create(image, tmp_path / "part", selected)
    assert [tuple(one) for one in bundle.extents()] == [
        (4096, 8192, "data"),
        (3 * MIB, 4096, "zero"),
    ]
    with pytest.raises(dr.UsageError, match="includes"):
        bundle.read(0, 4096)
    with pytest.raises(dr.UsageError, match="includes"):
        bundle.read(4096, 8193)


def test_extents_of_a_terabyte_come_one_by_one(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 1 << 40)
    with image.open("r+b") as file:
        file.seek(1 << 39)
        file.write(b"x" * 4096)
    extents = dr.Bundle.create(image, tmp_path / "bundle").extents()
    assert next(extents) == (0, 1 << 39, "zero")
    assert next(extents).offset == 1 << 39
    assert next(extents).end == 1 << 40
    assert next(extents, None) is None


def test_any_range_is_read(bundle: dr.Bundle, image: Path) -> None:
    held = image.read_bytes()
    for offset, length in [
        (0, 1),
        (0, SIZE),
        (7, 3 * MIB),
        (2 * MIB - 1, 2),
        (3 * MIB, 4096),
        (SIZE - 512, 512),
        (SIZE, 0),
    ]:
        view = memoryview(bundle.read(offset, length))
        assert view.readonly
        assert view == held[offset : offset + length], (offset, length)


def test_ranges_outside_the_volume_and_too_long_ones_are_refused(bundle: dr.Bundle) -> None:
    for offset, length in [(0, SIZE + 1), (SIZE, 1), (2**64 - 1, 1), (1 << 63, 512)]:
        with pytest.raises(dr.UsageError):
            bundle.read(offset, length)
    with pytest.raises(OverflowError):
        bundle.read(-1, 1)


def test_no_more_than_a_gibibyte_is_read_at_a_time(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 1 << 31)
    bundle = dr.Bundle.create(image, tmp_path / "bundle")
    with pytest.raises(dr.UsageError, match="part by part"):
        bundle.read(0, (1 << 30) + 1)


def test_chunks_are_read_only_memory_of_the_core(bundle: dr.Bundle, image: Path) -> None:
    held = numpy.frombuffer(image.read_bytes(), numpy.uint8)
    covered = 0
    for chunk in bundle.chunks():
        seen = numpy.frombuffer(memoryview(chunk), numpy.uint8)
        again = numpy.frombuffer(memoryview(chunk), numpy.uint8)
        assert seen.ctypes.data == again.ctypes.data, "the same memory, not a copy"
        assert not seen.flags.writeable
        assert (seen == held[chunk.offset : chunk.offset + len(chunk)]).all()
        covered += len(chunk)
    assert covered == 4 * MIB + 512


def test_a_chunk_outlives_its_bundle(image: Path, tmp_path: Path) -> None:
    chunk = next(dr.Bundle.create(image, tmp_path / "bundle").chunks())
    view = memoryview(chunk)
    del chunk
    assert view == image.read_bytes()[: len(view)]


def test_a_range_within_a_chunk_shares_its_memory(image: Path, tmp_path: Path) -> None:
    bundle = dr.Bundle.create(image, tmp_path / "bundle")
    whole = numpy.frombuffer(memoryview(bundle.read(0, 65536)), numpy.uint8)
    part = numpy.frombuffer(memoryview(bundle.read(512, 4096)), numpy.uint8)
    assert part.ctypes.data == whole.ctypes.data + 512


def test_damage_is_raised_and_the_rest_is_read(image: Path, tmp_path: Path) -> None:
    bundle = dr.Bundle.create(image, tmp_path / "bundle")
    with Path(bundle.path, "seg-00000000.drs").open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"damage")
    with pytest.raises(dr.IntegrityError):
        bundle.read(0, MIB)
    held = image.read_bytes()
    assert memoryview(bundle.read(MIB, 4096)) == held[MIB : MIB + 4096]
    chunks = bundle.chunks()
    with pytest.raises(dr.IntegrityError):
        list(chunks)
    rest = list(chunks)
    assert rest, "it goes on"
    assert all(memoryview(one) == held[one.offset : one.offset + len(one)] for one in rest)
    assert next(bundle.extents()) == (0, 2 * MIB, "data"), "found without reading it"


def test_an_encrypted_bundle_is_read_with_its_key_only(image: Path, tmp_path: Path) -> None:
    place = tmp_path / "locked"
    identity = tmp_path / "identity.txt"
    subprocess.run(["age-keygen", "-o", identity], capture_output=True, check=True)
    words = ["age-keygen", "-y", str(identity)]
    recipient = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    dr.Bundle.create(image, place, recipients=[recipient])
    bundle = dr.Bundle.open(place, identity=identity)
    assert memoryview(bundle.read(7, MIB)) == image.read_bytes()[7 : MIB + 7]
    assert [one.kind for one in bundle.extents()] == ["data", "zero", "data"]
    assert sum(len(chunk) for chunk in bundle.chunks()) == 4 * MIB + 512
    for read in (
        lambda: dr.Bundle.open(place).read(0, 1),
        lambda: dr.Bundle.open(place).extents(),
        lambda: dr.Bundle.open(place).chunks(),
    ):
        with pytest.raises(dr.LockedError):
            read()


def test_a_signed_bundle_gives_only_what_was_signed(image: Path, tmp_path: Path) -> None:
    key, signers, place = tmp_path / "signing", tmp_path / "signers", tmp_path / "bundle"
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
    subprocess.run(words, check=True)
    signers.write_text(f"operator@example {key.with_suffix('.pub').read_text()}")
    dr.Bundle.create(image, place, sign=key)
    bundle = dr.Bundle.open(place, signers=signers)
    held = image.read_bytes()
    assert memoryview(bundle.read(0, SIZE)) == held
    assert bundle.extract(tmp_path / "raw").whole
    # Of a signed segment all of whose pages are not as they were, nothing is given.
    with (place / "seg-00000000.drs").open("r+b") as file:
        file.seek(4096 + 200)
        file.write(b"forged")
    forged = dr.Bundle.open(place, signers=signers)
    with pytest.raises(dr.IntegrityError):
        forged.read(SIZE - 512, 512)
    assert list(forged.extents()) == []
    with pytest.raises(dr.SignatureError):
        dr.Bundle.open(dr.Bundle.create(image, tmp_path / "unsigned").path, signers=signers)


def test_a_tar_is_read_like_a_directory(bundle: dr.Bundle, image: Path, tmp_path: Path) -> None:
    tar = tmp_path / "b.tar"
    subprocess.run(["tar", "-cf", tar, "-C", bundle.path, "."], check=True)
    packed = dr.Bundle.open(tar)
    assert list(packed.extents()) == list(bundle.extents())
    assert memoryview(packed.read(0, SIZE)) == image.read_bytes()
