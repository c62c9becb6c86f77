"""Merging beside its peers and its bound, in one run: `python -m benches.bulk.run [--brief]`.

Only ratios within one run mean anything: each figure is the median of interleaved repetitions, each
in another order, since many disks of rented machines let bursts through and then hold back. The
bound is a bare io_uring loop over the very same extents (`bound.rs`), the best of a few sizes.
Useful bytes are those that had to be written. Times are those of the work itself, without the start
of a process where a tool tells them, else of the whole command.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import dualrestore as dr

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
GRAIN = 64 * 1024
ROOT = Path(__file__).resolve().parents[2]
BOUND_SIZES = ((2 * MIB, 8), (MIB, 16), (256 * 1024, 32))
Extents = list[tuple[int, int]]
"""Offset and length of what is missing, ascending, not touching."""


class Figure(NamedTuple):
    """Useful GB a second, and processor seconds for one useful GB."""

    speed: float
    processor: float


class Place(NamedTuple):
    """The files of one row of the table."""

    top: Path
    size: int
    source: Path
    target: Path
    extents: Extents

    @property
    def useful(self) -> int:
        """Bytes that a tool has to write."""
        return sum(length for _, length in self.extents)


def scattered(size: int, current: float) -> Extents:
    """Each 64 KiB is current with this probability."""
    chance = random.Random(1)
    return joined(at for at in range(0, size, GRAIN) if chance.random() >= current)


def clustered(size: int, current: float) -> Extents:
    """The same in stretches of 16 MiB."""
    chance = random.Random(2)
    starts = [at for at in range(0, size, 16 * MIB) if chance.random() >= current]
    return joined(at + step for at in starts for step in range(0, 16 * MIB, GRAIN))


def joined(grains: Iterator[int]) -> Extents:
    """Runs of neighbouring grains."""
    extents: Extents = []
    for at in grains:
        if extents and sum(extents[-1]) == at:
            extents[-1] = (extents[-1][0], extents[-1][1] + GRAIN)
        else:
            extents.append((at, GRAIN))
    return extents


def noise(path: Path, size: int) -> None:
    """A file of random bytes."""
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def half_holes(path: Path, size: int) -> None:
    """A file of which every second MiB is a hole."""
    with path.open("wb") as file:
        file.truncate(size)
        for at in range(0, size, 2 * MIB):
            file.seek(at)
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def command(words: list[str | Path]) -> tuple[float, float]:
    """Runs a tool; its seconds and processor seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    subprocess.run([str(word) for word in words], check=True, capture_output=True)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(place: Place, source: Path, engine: str = "auto") -> tuple[float, float]:
    """One merge with a fresh map of these extents."""
    path = place.top / "over.map"
    path.unlink(missing_ok=True)
    with dr.OverwriteMap.create(path, size=place.size) as over:
        at = 0
        for offset, length in [*place.extents, (place.size, 0)]:
            if offset > at:
                over.mark_current(at, offset - at)
            at = offset + length
        before = resource.getrusage(resource.RUSAGE_SELF)
        begun = time.perf_counter()
        report = dr.merge(source, place.target, over, engine=engine)
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert report.bytes_written == place.useful, (report, place.useful)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bound(place: Place, slot: int, slots: int) -> tuple[float, float]:
    """The bare loop."""
    program = ROOT / "target" / "release" / "bound"
    listed = place.top / "extents"
    listed.write_text("".join(f"{offset} {length}\n" for offset, length in place.extents))
    words = [program, place.source, place.target, listed, slot, slots]
    printed = subprocess.run([str(word) for word in words], check=True, capture_output=True)
    seconds, processor = printed.stdout.split()
    return float(seconds), float(processor)


def domain_map(place: Place) -> Path:
    """What is missing, as ddrescue reads it."""
    path = place.top / "domain"
    lines, at = ["0x0 + 1"], 0
    for offset, length in place.extents:
        if offset > at:
            lines.append(f"{at:#x} {offset - at:#x} ?")
        lines.append(f"{offset:#x} {length:#x} +")
        at = offset + length
    if at < place.size:
        lines.append(f"{at:#x} {place.size - at:#x} ?")
    path.write_text("\n".join(lines) + "\n")
    return path


def ddrescue(place: Place, *, direct: bool = True) -> tuple[float, float]:
    """GNU ddrescue with a domain map of what is missing."""
    domain, log = domain_map(place), place.top / "rescue.log"
    log.unlink(missing_ok=True)
    past_the_cache = ["-d", "-D"] if direct else []
    words: list[str | Path] = [
        "ddrescue",
        "-q",
        "-f",
        *past_the_cache,
        "-b",
        "4096",
        "-c",
        "512",
        "-m",
        domain,
    ]
    return command([*words, place.source, place.target, log])


def dd(place: Place) -> tuple[float, float]:
    """A plain copy."""
    return command(
        [
            "dd",
            f"if={place.source}",
            f"of={place.target}",
            "bs=4M",
            "iflag=direct",
            "oflag=direct",
            "conv=notrunc,fdatasync",
        ]
    )


def qemu_img(place: Place, *, direct: bool = True) -> tuple[float, float]:
    """A plain copy, eight requests at a time."""
    past_the_cache = ["-T", "none", "-t", "none"] if direct else []
    words = ["qemu-img", "convert", "-n", "-W", "-m", "8", *past_the_cache]
    return command([*words, "-f", "raw", "-O", "raw", place.source, place.target])


def nbdcopy(place: Place) -> tuple[float, float]:
    """A copy that keeps holes."""
    return command(["nbdcopy", place.source, place.target])


Contender = "Callable[[], tuple[float, float]]"


def compare(
    row: str, place: Place, contenders: dict[str, Callable[[], tuple[float, float]]], times: int
) -> dict[str, Figure]:
    """Medians of interleaved repetitions, printed with what they are of ours."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    chance = random.Random(row)
    for _ in range(times):
        for name in chance.sample(list(contenders), len(contenders)):
            found[name].append(contenders[name]())
    figures = {}
    for name, all_of_them in found.items():
        seconds = statistics.median(one for one, _ in all_of_them)
        processor = statistics.median(one for _, one in all_of_them)
        figures[name] = Figure(place.useful / seconds / 1e9, processor * 1e9 / place.useful)
    mine = figures["merge"].speed
    print(f"\n{row}: {place.useful / 1e9:.2f} useful GB")
    for name, figure in figures.items():
        print(
            f"  {name:34} {figure.speed:6.2f} GB/s {figure.processor:6.3f} s/GB"
            f"   merge is {mine / figure.speed:5.2f} x"
        )
    sys.stdout.flush()
    return figures


def bounds(place: Place) -> dict[str, Callable[[], tuple[float, float]]]:
    """The bare loop with each size."""

    def one(slot: int, slots: int) -> Callable[[], tuple[float, float]]:
        return lambda: bound(place, slot, slots)

    return {f"bound {slots} x {slot // 1024} KiB": one(slot, slots) for slot, slots in BOUND_SIZES}


def on_disk(top: Path, size: int, times: int) -> dict[str, dict[str, Figure]]:
    """All rows that are bound by the disk."""
    source, target, bundle = top / "source.raw", top / "target.raw", top / "bundle"
    noise(source, size)
    noise(target, size)
    whole = Place(top, size, source, target, [(0, size)])
    found = {}

    def merging(place: Place) -> dict[str, Callable[[], tuple[float, float]]]:
        return {
            "merge": lambda: ours(place, source),
            "merge, threads": lambda: ours(place, source, "threads"),
        }

    dr.Bundle.create(source, bundle)
    found["all missing"] = compare(
        "all missing",
        whole,
        merging(whole)
        | {"merge of a bundle, verified": lambda: ours(whole, bundle)}
        | bounds(whole)
        | {
            "ddrescue": lambda: ddrescue(whole),
            "dd": lambda: dd(whole),
            "qemu-img": lambda: qemu_img(whole),
        },
        times,
    )
    for name, extents in (
        ("50 % current, scattered", scattered(size, 0.5)),
        ("90 % current, scattered", scattered(size, 0.9)),
        ("90 % current, clustered", clustered(size, 0.9)),
    ):
        place = Place(top, size, source, target, extents)
        found[name] = compare(
            name,
            place,
            merging(place)
            | {"merge of a bundle, verified": lambda place=place: ours(place, bundle)}
            | bounds(place)
            | {"ddrescue": lambda place=place: ddrescue(place)},
            times,
        )
    shutil.rmtree(bundle)
    found["bundle"] = compare_bundle(whole, bundle, times)
    found["half holes"] = with_holes(whole, times)
    return found


def with_holes(sparse: Place, times: int) -> dict[str, Figure]:
    """A source of which half is holes, onto a new file."""
    _, size, source, target, _ = sparse
    half_holes(source, size)

    def fresh(work: Callable[[], tuple[float, float]]) -> Callable[[], tuple[float, float]]:
        def of_a_new_target() -> tuple[float, float]:
            target.unlink()
            with target.open("wb") as file:
                file.truncate(size)
            return work()

        return of_a_new_target

    return compare(
        "half holes",
        sparse,
        {
            "merge": fresh(lambda: ours(sparse, source)),
            "nbdcopy": fresh(lambda: nbdcopy(sparse)),
            "qemu-img": fresh(lambda: qemu_img(sparse)),
        },
        times,
    )


def compare_bundle(place: Place, bundle: Path, times: int) -> dict[str, Figure]:
    """Writing a bundle beside dd of the same bytes."""

    def written() -> tuple[float, float]:
        shutil.rmtree(bundle, ignore_errors=True)
        before = resource.getrusage(resource.RUSAGE_SELF)
        begun = time.perf_counter()
        dr.Bundle.create(place.source, bundle)
        seconds = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_SELF)
        return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def copied() -> tuple[float, float]:
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir()
        return command(
            [
                "dd",
                f"if={place.source}",
                f"of={bundle / 'copy'}",
                "bs=4M",
                "iflag=direct",
                "oflag=direct",
                "conv=fdatasync",
            ]
        )

    figures = compare("bundle written", place, {"merge": written, "dd": copied}, times)
    shutil.rmtree(bundle)
    return figures


def in_memory(size: int, times: int) -> dict[str, dict[str, Figure]]:
    """Rows whose files lie in memory."""
    found = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        top = Path(scratch)
        source, target = top / "source.raw", top / "target.raw"
        noise(source, size)
        noise(target, size)
        for name, extents in (
            ("in memory, all missing", [(0, size)]),
            ("in memory, 50 % current", scattered(size, 0.5)),
        ):
            place = Place(top, size, source, target, extents)
            contenders: dict[str, Callable[[], tuple[float, float]]] = {
                "merge": partial(ours, place, source),
                "ddrescue": partial(ddrescue, place, direct=False),
                "qemu-img": partial(qemu_img, place, direct=False),
            }
            if len(extents) > 1:
                del contenders["qemu-img"]
            found[name] = compare(name, place, contenders, times)
    return found


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="small files, once: that it runs")
    parser.add_argument("--size", type=int, default=8 << 30, help="bytes of the image")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size, times = (128 * MIB, 1) if arguments.brief else (arguments.size, arguments.times)
    subprocess.run(
        ["cargo", "build", "--quiet", "--release", "-p", "dualrestore-benches", "--bin", "bound"],
        cwd=ROOT,
        check=True,
    )
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        found = on_disk(Path(scratch), size, times)
    found |= in_memory(min(size, 2 << 30), times)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
