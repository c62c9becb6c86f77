"""The JSON documents of the command line: names and types of their fields, as frozen files.

`DUALRESTORE_GOLDEN=write` writes the files anew. A field may be added in a version of the program;
one that is renamed, removed or of another type breaks somebody's script.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.harness import MIB, Pair, dualrestore, run

if TYPE_CHECKING:
    from collections.abc import Sequence

GOLDEN = Path(__file__).parent.parent / "golden" / "documents-v1"
TYPES = {bool: "truth", int: "number", float: "number", str: "text", type(None): "nothing"}


def shape(document: Any) -> Any:
    """The document with types for values; of a list, its first element."""
    if isinstance(document, dict):
        return {name: shape(value) for name, value in sorted(document.items())}
    if isinstance(document, list):
        return [shape(value) for value in document[:1]]
    return TYPES[type(document)]


def agree(found: Any, frozen: Any) -> bool:
    """Whether two shapes are the same; what is absent on one side may be of any type."""
    if isinstance(found, dict) and isinstance(frozen, dict):
        return set(found) == set(frozen) and all(agree(found[key], frozen[key]) for key in found)
    if isinstance(found, list) and isinstance(frozen, list):
        return all(agree(one, other) for one, other in zip(found, frozen, strict=False))
    return found == frozen or "nothing" in (found, frozen)


def check(name: str, document: Any) -> None:
    """The document has the shape of its golden file."""
    found = shape(document)
    path = GOLDEN / f"{name}.json"
    if os.environ.get("DUALRESTORE_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    frozen = json.loads(path.read_text())
    assert agree(found, frozen), f"{name}: {found}, frozen as {frozen}"


def told(words: Sequence[str | Path], code: int = 0) -> Any:
    """What a verb prints with `--json`: on standard output, or the error on the other."""
    finished = dualrestore(*words, "--json", expect=code)
    return json.loads(finished.stdout if code in {0, 3} else finished.stderr)


def test_the_documents_of_files_keep_their_shape(tmp_path: Path) -> None:
    image, target, over, bundle = (tmp_path / name for name in ("image", "target", "map", "drb"))
    image.write_bytes(bytes(range(256)) * 4096)
    target.write_bytes(bytes(MIB))
    check("map-create", told(["map", "create", over, "--size", "1MiB"]))
    check("map-mark", told(["map", "mark", over, "0-64KiB"]))
    check("map-show", told(["map", "show", over]))
    check("map-export", told(["map", "export", over]))
    check("map-picture", told(["map", "picture", over]))
    check("bundle-create", told(["bundle", "create", image, "--to", bundle]))
    check("bundle-show", told(["bundle", "show", bundle]))
    check("bundle-verify", told(["bundle", "verify", bundle]))
    segment = bundle / "seg-00000000.drs"
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        file.write(b"damage")
    check("merge", told(["merge", bundle, target, "--map", over], code=3))
    check("bundle-extract", told(["bundle", "extract", bundle, "--to", tmp_path / "raw"], code=3))
    check(
        "verify-files", json.loads(dualrestore("verify", image, target, "--json", expect=4).stdout)
    )
    check("error", told(["map", "show", tmp_path / "nowhere"], code=1))
    check("init", told(["init", tmp_path / "c.toml"]))


def test_the_documents_of_daemons_keep_their_shape(pair: Pair) -> None:
    run(["qemu-io", "-f", "raw", "-c", "write -P 3 0 1M", "-c", "flush", pair.uri])
    check("snapshot", cut := pair.primary.verb_json("snapshot", "v", "--label", "monday"))
    check("snapshot-list", pair.backup.verb_json("snapshot", "v", "--list"))
    check("restore", pair.primary.verb_json("restore", "v", "--lost", "1MiB-2MiB"))
    bundle = pair.bundle(pair.snapshot())
    check("attach", pair.primary.verb_json("attach", bundle, "v"))
    check("status-attached", pair.primary.verb_json("status"))
    check("detach", pair.primary.verb_json("detach", bundle, "v"))
    pair.primary.verb("restore", "v", "--lost", "none")
    pair.wait_mirrored()
    check("status-primary", pair.primary.verb_json("status"))
    check("status-backup", pair.backup.verb_json("status"))
    check("verify", pair.primary.verb_json("verify", "v"))
    check("map-show-live", pair.primary.verb_json("map", "show", "v"))
    check("snapshot-delete", pair.backup.verb_json("snapshot", "v", "--delete", cut["snapshot"]))
