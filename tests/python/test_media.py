"""Bundles over several media, by the command line and by the API."""

import json
import os
from pathlib import Path

import pytest

import dualrestore as dr
from dualrestore.cli import run
from dualrestore.core import disk_behind
from dualrestore.errors import IdentityError, NextMediumError, UsageError

SIZE = 24 << 20
MEDIUM = 10 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image that takes three media, and a place of its own for records."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "image"
    path.write_bytes(os.urandom(SIZE))
    return path


def merged(media: list[Path], place: Path) -> bytes:
    """What the media give together, in that order."""
    target = place / "target"
    target.write_bytes(b"\xee" * SIZE)
    with dr.OverwriteMap.create(place / "target.map", size=SIZE) as overwrite_map:
        for medium in media:
            dr.merge(medium, target, overwrite_map)
        assert overwrite_map.missing_bytes == 0
    return target.read_bytes()


def test_media_that_run_out_end_with_code_6_and_another_goes_on(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = [tmp_path / f"m{number}" for number in (1, 2, 3)]
    begin = ["bundle", "create", str(image), "--medium-size", "10MiB", "--json"]
    assert run([*begin, "--to", str(media[0]), "--to", str(media[1])]) == 6
    told = json.loads(capsys.readouterr().out)
    assert (told["complete"], told["next_medium"], told["media"]) == (False, 3, 2)
    assert run([*begin, "--to", str(media[2]), "--continue"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_left"] == 0
    assert merged([media[2], media[0], media[1]], tmp_path) == image.read_bytes()
    assert not any((tmp_path / "state/dualrestore/bundles").iterdir())
    shown = [dr.Bundle.open(medium).show() for medium in media]
    assert [(one["medium"], one["last"]) for one in shown] == [(1, False), (2, False), (3, True)]


def test_all_media_are_merged_by_one_command_and_a_damaged_chunk_comes_from_another(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = [tmp_path / f"m{number}" for number in (1, 2, 3)]
    dr.Bundle.create(image, media[0], media=media[1:], medium_size=MEDIUM)
    dr.Bundle.create(image, tmp_path / "whole")
    segment = next(media[1].glob("seg-*"))
    with segment.open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"damaged")
    target, overwrite_map = tmp_path / "target", tmp_path / "map"
    merge = ["merge", *map(str, media), str(target), "--map", str(overwrite_map)]

    def lose() -> None:
        target.write_bytes(os.urandom(SIZE))
        overwrite_map.unlink(missing_ok=True)
        assert run(["map", "create", str(overwrite_map), "--size", str(SIZE)]) == 0
        capsys.readouterr()

    lose()
    assert run([*merge, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert [one["source"] for one in told["sources"]] == [str(medium) for medium in media]
    assert [one["chunks_damaged"] for one in told["sources"]] == [0, 1, 0]
    assert told["bytes_written"] == sum(one["bytes_written"] for one in told["sources"])
    assert run([*merge[:-3], str(tmp_path / "whole"), *merge[-3:], "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["chunks_repaired"], told["chunks_damaged"]) == (1, 0)
    assert target.read_bytes() == image.read_bytes()
    lose()
    assert run(merge) == 3
    said = capsys.readouterr().out
    assert f"{media[1]}: wrote" in said
    assert "1 chunks damaged, 1 of them left missing" in said


def test_one_foreign_bundle_among_several_keeps_all_from_being_merged(
    image: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(SIZE + 4096))
    for place in (image, other):
        dr.Bundle.create(place, place.with_suffix(".drb"))
    target = tmp_path / "target"
    target.write_bytes(b"\xee" * SIZE)
    both = [image.with_suffix(".drb"), other.with_suffix(".drb")]
    with dr.OverwriteMap.create(tmp_path / "map", size=SIZE) as overwrite_map:
        with pytest.raises(IdentityError, match=str(SIZE + 4096)):
            dr.merge(both, target, overwrite_map)
        assert overwrite_map.current_bytes == 0
        assert dr.merge(both[:1], target, overwrite_map).bytes_written == SIZE
    assert target.read_bytes() == image.read_bytes()


def test_a_source_that_changed_is_not_gone_on_with(image: Path, tmp_path: Path) -> None:
    state = tmp_path / "records"
    state.mkdir()
    with pytest.raises(NextMediumError):
        dr.Bundle.create(image, tmp_path / "m1", medium_size=MEDIUM, state=state)
    with image.open("r+b") as file:
        file.write(b"x")
    os.utime(image, ns=(1, 1))
    with pytest.raises(IdentityError, match="changed"):
        dr.Bundle.create(image, tmp_path / "m2", state=state, proceed=True)
    assert not (tmp_path / "m2").exists()


def test_there_is_nothing_to_go_on_with_before_something_was_begun(
    image: Path, tmp_path: Path
) -> None:
    assert run(["bundle", "create", str(image), "--to", str(tmp_path / "m"), "--continue"]) == 2


def test_only_what_is_allocated_is_included_and_the_bundle_says_so(tmp_path: Path) -> None:
    image = tmp_path / "sparse"
    with image.open("wb") as file:
        file.truncate(SIZE)
        file.seek(8 << 20)
        file.write(os.urandom(1 << 20))
    bundle = dr.Bundle.create(image, tmp_path / "out", allocated=True)
    shown = bundle.show()
    assert shown["allocated_only"]
    assert shown["extents"] == [(8 << 20, 1 << 20)]


def test_an_image_cannot_be_incremental_and_a_missing_table_has_no_partitions(
    image: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="snapshot"):
        dr.Bundle.create(image, tmp_path / "a", since="00000000-0000-0000-0000-000000000001")
    with pytest.raises(UsageError, match="partition"):
        dr.Bundle.create(image, tmp_path / "b", partitions=[1])


def test_a_place_in_memory_or_on_a_built_in_disk_is_not_removable(tmp_path: Path) -> None:
    disk = disk_behind(tmp_path)
    assert disk is None or disk.size > 0
    assert disk_behind(Path("/proc")) is None
