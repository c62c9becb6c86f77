"""What `merge` can be asked beside merging: to say what it would do, to keep, to put back."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dualrestore.cli import run

MIB = 2**20
SIZE = 4 * MIB


class Place:
    """An image, its bundle, a target of other bytes, and a map of which one MiB is current."""

    def __init__(self, top: Path, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured
        self.image, self.bundle = top / "image", top / "bundle"
        self.target, self.map, self.kept = top / "target", top / "map", top / "kept"
        self.image.write_bytes(os.urandom(SIZE - MIB) + bytes(MIB))
        self.before = os.urandom(SIZE)
        self.target.write_bytes(self.before)
        self.ask("bundle", "create", self.image, "--to", self.bundle)
        self.ask("map", "create", self.map, "--size", SIZE)
        self.ask("map", "mark", self.map, f"0-{MIB}")

    def ask(self, *words: object, code: int = 0) -> str:
        """Runs a verb; what it says."""
        assert run([str(word) for word in words]) == code
        return self._captured.readouterr().out

    def merge(self, *options: object) -> dict[str, Any]:
        """Merges the bundle."""
        words = ("merge", self.bundle, self.target, "--map", self.map, "--json", *options)
        told: dict[str, Any] = json.loads(self.ask(*words))
        return told

    @property
    def missing(self) -> int:
        """Bytes that the map says are missing."""
        told: dict[str, Any] = json.loads(self.ask("map", "show", self.map, "--json"))
        return int(told["missing_bytes"])


@pytest.fixture
def place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Place:
    """See the class."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Place(tmp_path, capsys)


def test_a_dry_run_says_what_a_merge_then_does_and_leaves_all_as_it_was(place: Place) -> None:
    told = place.merge("--dry-run")
    assert told["dry_run"]
    assert place.target.read_bytes() == place.before
    assert place.missing == SIZE - MIB
    done = place.merge()
    for field in ("bytes_written", "bytes_zeroed", "bytes_skipped"):
        assert told[field] == done[field] > 0, field
    assert place.missing == 0


def test_what_a_merge_kept_is_put_back_and_may_be_merged_again(place: Place) -> None:
    place.merge("--undo", place.kept)
    assert place.target.read_bytes()[MIB:] == place.image.read_bytes()[MIB:]
    told = place.ask("merge", "--revert", place.kept, place.target, "--map", place.map, "--json")
    assert json.loads(told)["bytes_put_back"] == SIZE - MIB
    assert place.target.read_bytes() == place.before
    assert place.missing == SIZE - MIB
    assert place.merge()["bytes_written"] == SIZE - MIB


def test_what_several_media_overwrote_together_is_put_back(place: Place, tmp_path: Path) -> None:
    parts = []
    for number in range(3):
        parts.append(tmp_path / f"part{number}")
        place.ask(
            *("bundle", "create", place.image, "--to", parts[-1]),
            *("--select", f"{number}MiB-{number + 2}MiB"),
        )
    words = ("merge", *parts, place.target, "--map", place.map, "--json")
    forecast = json.loads(place.ask(*words, "--dry-run"))
    assert forecast["bytes_written"] == SIZE - MIB, "what two of them hold counts once"
    merged = json.loads(place.ask(*words, "--undo", place.kept))
    assert merged["bytes_written"] == SIZE - MIB
    assert place.target.read_bytes()[MIB:] == place.image.read_bytes()[MIB:]
    told = place.ask("merge", "--revert", place.kept, place.target, "--map", place.map, "--json")
    assert json.loads(told)["bytes_put_back"] == SIZE - MIB
    assert place.target.read_bytes() == place.before
    assert place.missing == SIZE - MIB


def test_each_engine_merges_the_same(place: Place) -> None:
    for engine in ("io_uring", "threads"):
        place.target.write_bytes(place.before)
        place.map.unlink()
        place.ask("map", "create", place.map, "--size", SIZE)
        assert place.merge("--engine", engine)["engine"] == engine
        assert place.target.read_bytes() == place.image.read_bytes()


def test_what_makes_no_sense_together_is_refused_and_nothing_touched(place: Place) -> None:
    for words in (
        ("merge", place.bundle, "db", "--dry-run"),
        ("merge", place.bundle, "db", "--undo", place.kept),
        ("merge", place.bundle, "db", "--engine", "threads"),
        ("merge", "--revert", place.kept, place.target),
        ("merge", "--revert", place.kept, place.target, "--map", place.map),
    ):
        place.ask(*words, code=2)
    assert place.target.read_bytes() == place.before
    assert not place.kept.exists()
