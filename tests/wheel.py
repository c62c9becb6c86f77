"""Checks a built wheel: `python tests/wheel.py WHEEL`.

One wheel serves every Python from 3.11 on (abi3); it carries types and the list of what is in it;
it names no place of the machine that built it.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from pathlib import Path

NEEDED = ("dualrestore/py.typed", "dualrestore/_core.pyi", "dualrestore/_core.abi3.so")
TOP = Path(__file__).resolve().parent.parent
SBOM = "sbom.cdx.json"
COMPILER = b"/rustc/"
"""Where the compiler's own sources pretend to be."""


def places() -> list[str]:
    """Directories of this machine that a careless build would name."""
    cargo = os.environ.get("CARGO_HOME") or str(Path.home() / ".cargo")
    return [str(TOP), cargo, str(Path.home())]


def faults(wheel: Path) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    found = []
    if re.fullmatch(r"dualrestore-[^-]+-cp311-abi3-[^-]*linux[^-]*\.whl", wheel.name) is None:
        found.append(f"{wheel.name}: expected a name with cp311-abi3 and a Linux tag")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found += [f"{needed} is missing" for needed in NEEDED if needed not in names]
        sboms = [name for name in names if ".dist-info/sboms/" in name]
        if [archive.read(name) for name in sboms] != [(TOP / SBOM).read_bytes()]:
            found.append(f"expected {SBOM} as its one list of crates, found {sboms or 'none'}")
        found += [f"{name} is no part of the package" for name in names if "__pycache__" in name]
        for name in names:
            content = archive.read(name).replace(COMPILER, b"")
            for place in places():
                at = content.find(place.encode() + b"/") if place != "/" else -1
                if at >= 0:
                    words = content[at : at + 100].decode(errors="replace").split("\0")[0]
                    found.append(f"{name} names a place of this machine: {words}")
    return found


def main() -> int:
    """Prints what is wrong; 1 if anything is."""
    (wheel,) = map(Path, sys.argv[1:])
    found = faults(wheel)
    for fault in found:
        print(f"{wheel.name}: {fault}")
    print(f"wheel: {'failed' if found else 'sound'}, {wheel.stat().st_size / 1e6:.1f} MB")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
