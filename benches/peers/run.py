"""Bulk work through other tools, in one run: `python -m benches.peers.run [--brief] [--json]`.

Only ratios within one run mean anything: machines differ and swing. Each figure is the median of
interleaved repetitions. NBD exports are compared by `benches.peers.live`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.e2e.harness import MIB, dualrestore, run

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "dualrestore"
Figures = dict[str, dict[str, list[float]]]


class Scale(NamedTuple):
    """How much work: bytes, repetitions."""

    bulk: int
    repetitions: int


BRIEF = Scale(64 * MIB, 1)
FULL = Scale(2048 * MIB, 3)


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure_bulk(scale: Scale, figures: Figures) -> None:
    """A raw image onto a file, by us with verification and a map, by the others as a plain copy."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        top = Path(scratch)
        image, target, over = top / "image.raw", top / "target.raw", top / "over.map"
        with image.open("wb") as file:
            for _ in range(scale.bulk // MIB):
                file.write(os.urandom(MIB))
        dualrestore("bundle", "create", image, "--to", top / "bundle")

        def fresh_target() -> None:
            target.unlink(missing_ok=True)
            with target.open("wb") as file:
                file.truncate(scale.bulk)

        def fresh_map(*, half: bool) -> None:
            over.unlink(missing_ok=True)
            dualrestore("map", "create", over, "--size", str(scale.bulk))
            if half:
                step = scale.bulk // 64
                ranges = [f"{at * 2 * step}-{(at * 2 + 1) * step}" for at in range(32)]
                dualrestore("map", "mark", over, *ranges)

        whole = "a bundle (or raw image) onto a file, MiB/s"
        half = "the same, half of it current, MiB/s of the missing half"
        merge = ("merge", top / "bundle", target, "--map", over)
        for label, share in ((whole, 1.0), (half, 0.5)):
            fresh_target()
            fresh_map(half=share < 1)
            seconds = seconds_of(partial(dualrestore, *merge))
            figures[label][OURS].append(scale.bulk * share / MIB / seconds)
        copies: dict[str, list[str | Path]] = {
            "nbdcopy": ["nbdcopy", "--flush", image, target],
            "qemu-img": [
                "qemu-img",
                "convert",
                "-n",
                "-W",
                "-f",
                "raw",
                "-O",
                "raw",
                image,
                target,
            ],
            "dd": ["dd", f"if={image}", f"of={target}", "bs=4M", "conv=notrunc,fsync"],
        }
        for name, command in copies.items():
            fresh_target()
            seconds = seconds_of(partial(run, command))
            figures[whole][name].append(scale.bulk / MIB / seconds)
            # A plain copy cannot leave the current half alone: it moves all to bring the half.
            figures[half][name].append(scale.bulk / 2 / MIB / seconds)


def report(figures: Figures) -> str:
    """A table: medians, and how ours compares with each peer."""
    lines = []
    for label, by_tool in figures.items():
        lines.append(label)
        ours = statistics.median(by_tool[OURS])
        for name, values in by_tool.items():
            median = statistics.median(values)
            ratio = "" if name == OURS else f"   ours / {name} = {ours / median:.2f}"
            lines.append(f"  {name:12} {median:12,.0f}{ratio}")
    return "\n".join(lines)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="small and short, so that none rots")
    parser.add_argument("--json", action="store_true", help="print medians as JSON")
    chosen = parser.parse_args()
    scale = BRIEF if chosen.brief else FULL
    figures: Figures = defaultdict(lambda: defaultdict(list))
    for _ in range(scale.repetitions):
        measure_bulk(scale, figures)
    if chosen.json:
        medians = {
            label: {name: statistics.median(values) for name, values in by_tool.items()}
            for label, by_tool in figures.items()
        }
        print(json.dumps(medians, indent=2))
    else:
        print(report(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
