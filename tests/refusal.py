"""What a refusal must be, as a user and a script meet it.

| seen | must be |
|---|---|
| exit code, with and without `--json` | the one of the table, the same |
| standard output | empty |
| standard error | one message with the words that are asked for, no traceback |
| standard error with `--json` | one document: kind, the same message, exit code |
| every file below the places | as it was, byte by byte |
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FAILED, USAGE, DIFFERENCES, NOT_OURS, LINK_DOWN, BUSY = 1, 2, 4, 5, 7, 11


class Ended(NamedTuple):
    """How a run of the program ended."""

    code: int
    out: str
    err: str


def _state_of(path: Path) -> str:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"link to {path.readlink()}"
    if not stat.S_ISREG(found.st_mode):
        return "directory" if stat.S_ISDIR(found.st_mode) else "special"
    with path.open("rb") as file:
        return f"{found.st_size} {hashlib.file_digest(file, 'blake2b').hexdigest()}"


def state_of(places: Sequence[Path]) -> dict[str, str]:
    """What is there: names, lengths and digests of all files below, or that nothing is."""
    found: dict[str, str] = {}
    for place in places:
        below = sorted(place.rglob("*")) if place.is_dir() else []
        for path in [place, *below]:
            found[str(path)] = _state_of(path) if os.path.lexists(path) else "nothing"
    return found


def refused(
    run: Callable[[Sequence[object]], Ended],
    words: Sequence[object],
    *,
    code: int,
    kind: str,
    says: Sequence[str],
    untouched: Sequence[Path],
) -> str:
    """Runs a verb twice, for people and for machines; it must be refused as told. The message."""
    before = state_of(untouched)
    plain, machine = run(words), run([*words, "--json"])
    assert state_of(untouched) == before, f"refused, and yet something changed: {plain.err}"
    for ended in (plain, machine):
        assert ended.code == code, f"exit code {ended.code}, expected {code}: {ended.err}"
        assert ended.out == "", ended.out
        assert "Traceback" not in ended.err, ended.err
    # A daemon may have logged before.
    document = json.loads(machine.err.splitlines()[-1])["error"]
    assert set(document) == {"kind", "message", "exit_code"}
    assert (document["kind"], document["exit_code"]) == (kind, code), document
    message: str = document["message"]
    # A snapshot that could not be cut has another name each time.
    assert _UUID.sub("", message) in _UUID.sub("", plain.err), (message, plain.err)
    for part in says:
        assert part.lower() in message.lower(), f"not said: {part!r} in {message!r}"
    return message
