"""What goes into a wheel, as CycloneDX: `python tests/sbom.py [--write]`.

maturin's own list names the directory it was built in and the time; this one says the same of the
same `Cargo.lock`, on every machine. It is committed (`sbom.cdx.json`), goes into the wheel as PEP
770 has it, and without `--write` is compared with what it must be.

Listed: the crates that are linked into the extension module on x86-64 or aarch64 (`required`), and
those that only make it: build scripts, macros and what they need (`excluded`). Python packages are
not in the wheel; its METADATA names them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
FILE = TOP / "sbom.cdx.json"
TARGETS = ("x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu")
ROOT = "dualrestore"


def metadata(target: str) -> dict[str, Any]:
    """What cargo knows, for one target."""
    command = ["cargo", "metadata", "--locked", "--format-version=1", "--features=python"]
    done = subprocess.run(
        [*command, f"--filter-platform={target}"], check=True, capture_output=True, cwd=TOP
    )
    known: dict[str, Any] = json.loads(done.stdout)
    return known


def _makes(package: dict[str, Any]) -> bool:
    """Whether it runs in the compiler, and is linked into nothing."""
    return any("proc-macro" in target["kind"] for target in package["targets"])


def reached(known: dict[str, Any]) -> tuple[set[str], set[str]]:
    """Identifiers of what is linked, and of all that is needed."""
    packages = {package["id"]: package for package in known["packages"]}
    nodes = {node["id"]: node for node in known["resolve"]["nodes"]}
    [root] = [key for key, package in packages.items() if package["name"] == ROOT]
    linked: set[str] = set()
    needed: set[str] = set()
    open_ends = [(root, True)]
    while open_ends:
        key, is_linked = open_ends.pop()
        is_linked = is_linked and not _makes(packages[key])
        if key in linked or (key in needed and not is_linked):
            continue
        needed.add(key)
        if is_linked:
            linked.add(key)
        for edge in nodes[key]["deps"]:
            kinds = {kind["kind"] for kind in edge["dep_kinds"]}
            if None in kinds:
                open_ends.append((edge["pkg"], is_linked))
            elif "build" in kinds:
                open_ends.append((edge["pkg"], False))
    return linked, needed


def components() -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Components, who needs whom, and the version of the whole."""
    lock = tomllib.loads((TOP / "Cargo.lock").read_text())
    sums = {(one["name"], one["version"]): one.get("checksum") for one in lock["package"]}
    found: dict[str, dict[str, Any]] = {}
    needs: dict[str, set[str]] = {}
    version = ""
    for target in TARGETS:
        known = metadata(target)
        names = {
            package["id"]: f"pkg:cargo/{package['name']}@{package['version']}"
            for package in known["packages"]
        }
        linked, needed = reached(known)
        for package in known["packages"]:
            key = package["id"]
            if key not in needed:
                continue
            if package["name"] == ROOT:
                version = package["version"]
            else:
                component = found.setdefault(names[key], _component(package, sums))
                if key in linked:
                    component["scope"] = "required"
        for node in known["resolve"]["nodes"]:
            if node["id"] in needed:
                inside = {names[edge["pkg"]] for edge in node["deps"] if edge["pkg"] in needed}
                needs.setdefault(names[node["id"]], set()).update(inside)
    edges = [{"ref": name, "dependsOn": sorted(needs[name])} for name in sorted(needs)]
    return [found[name] for name in sorted(found)], edges, version


def _component(package: dict[str, Any], sums: dict[tuple[str, str], str]) -> dict[str, Any]:
    name, version = package["name"], package["version"]
    reference = f"pkg:cargo/{name}@{version}"
    return {
        "type": "library",
        "bom-ref": reference,
        "name": name,
        "version": version,
        "scope": "excluded",
        "purl": reference,
        "licenses": [{"expression": package["license"].replace("/", " OR ")}],
        "hashes": [{"alg": "SHA-256", "content": sums[name, version]}],
    }


def document() -> str:
    """The whole of it."""
    listed, edges, version = components()
    root = f"pkg:cargo/{ROOT}@{version}"
    whole = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": root,
                "name": ROOT,
                "version": version,
                "purl": f"pkg:pypi/{ROOT}@{version}",
                "licenses": [{"expression": "Apache-2.0"}],
            }
        },
        "components": listed,
        "dependencies": edges,
    }
    return json.dumps(whole, indent=1) + "\n"


def main() -> int:
    """1 if the committed list is not what it must be."""
    text = document()
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(text)
        print(f"wrote {FILE.name}")
        return 0
    if not FILE.exists() or FILE.read_text() != text:
        print(
            f"{FILE.name}: expected the crates of Cargo.lock, found others; "
            "run: python tests/sbom.py --write"
        )
        return 1
    print(f"{FILE.name}: the {text.count('bom-ref') - 1} crates of Cargo.lock")
    return 0


if __name__ == "__main__":
    sys.exit(main())
