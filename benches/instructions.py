"""Counts the instructions of the hot kernels under callgrind and compares them with figures.

Wall time on shared machines swings twofold; instruction counts do not. A kernel may not need more
than `TOLERANCE` above its committed figure (`OTHER_COMPILER_TOLERANCE` when the figures were made
with another compiler). `--accept` writes the counts of this run as the new figures.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
FIGURES = TOP / "benches" / "instructions.json"
TOLERANCE = 0.04
OTHER_COMPILER_TOLERANCE = 0.30
KERNEL_NAME = re.compile(r'name: "(\w+)"')
COLLECTED = re.compile(r"Collected : (\d+)")


def build() -> Path:
    """Builds the program of kernels, optimised as the package is; returns its path."""
    command = ["cargo", "build", "--quiet", "--release", "--package", "dualrestore-benches"]
    finished = subprocess.run(
        [*command, "--bin", "instructions", "--message-format=json"],
        cwd=TOP,
        check=True,
        stdout=subprocess.PIPE,
    )
    for line in finished.stdout.splitlines():
        message = json.loads(line)
        executable = message.get("executable")
        if executable and message["target"]["name"] == "instructions":
            return Path(executable)
    raise SystemExit("cargo built no program named instructions")


def kernels() -> list[str]:
    """The names of the kernels, as the program lists them."""
    return KERNEL_NAME.findall((TOP / "benches" / "kernels" / "mod.rs").read_text())


def count(program: Path, kernel: str) -> int:
    """Instructions that the kernel takes, counted by callgrind."""
    with tempfile.TemporaryDirectory() as scratch:
        finished = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={scratch}/out",
                "--collect-atstart=no",
                "--toggle-collect=*measured*",
                str(program),
                kernel,
            ],
            check=False,
            capture_output=True,
            text=True,
        )
    found = COLLECTED.search(finished.stderr)
    if finished.returncode != 0 or found is None or int(found[1]) == 0:
        raise SystemExit(f"{kernel}: callgrind counted nothing\n{finished.stderr}")
    return int(found[1])


def compiler() -> str:
    """The compiler and the architecture that the counts depend on."""
    version = subprocess.run(["rustc", "--version"], check=True, capture_output=True, text=True)
    return f"{version.stdout.strip()}, {platform.machine()}"


def main(arguments: list[str]) -> int:
    """Prints a line for each kernel; 1 if one of them needs too many instructions."""
    program = build()
    counts = {kernel: count(program, kernel) for kernel in kernels()}
    if "--accept" in arguments:
        FIGURES.write_text(json.dumps({"compiler": compiler(), "counts": counts}, indent=2) + "\n")
    figures = json.loads(FIGURES.read_text())
    same = figures["compiler"] == compiler()
    tolerance = TOLERANCE if same else OTHER_COMPILER_TOLERANCE
    print(f"figures of {figures['compiler']}; this is {compiler()}; tolerance {tolerance:.0%}")
    failed = 0
    for kernel, counted in counts.items():
        expected = figures["counts"].get(kernel)
        if expected is None:
            print(f"{kernel:32} {counted:12}  no figure: run with --accept and commit it")
            failed += 1
            continue
        change = counted / expected - 1
        verdict = "ok" if change <= tolerance else "TOO MANY"
        if change < -tolerance:
            verdict = "fewer: accept the better figure"
        failed += verdict == "TOO MANY"
        print(f"{kernel:32} {counted:12}  figure {expected:12}  {change:+7.2%}  {verdict}")
    stale = sorted(set(figures["counts"]) - set(counts))
    if stale:
        print(f"figures of kernels that are gone: {', '.join(stale)}; run with --accept")
    failed += len(stale)
    print(f"instructions: {len(counts) + len(stale) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
