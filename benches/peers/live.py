"""NBD exports, ours and the peers', in one run: `python -m benches.peers.live [--brief] [--json]`.

| place | work |
|---|---|
| memory | 4 KiB at random, 32 under way, over 1 and 4 connections; one at a time; a stream |
| disk, past the page cache | the same 4 KiB; beside them fio's io_uring on the file itself |
| memory, over TLS | 4 KiB reads, 32 under way; a stream out |
| memory, mirrored | 4 KiB random writes by each policy |

Only ratios within one run mean anything. Repetitions are interleaved and their median is told,
with the load of the machine before each. `--only` picks places; `--brief` does a little of each
beside one peer, so that none rots.
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
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trustme

from benches.peers.servers import DISK, MEMORY, OURS, SERVERS, Place, Serving, mirrored
from tests.e2e.harness import MIB, run
from tests.e2e.pki import write_pki

if TYPE_CHECKING:
    from collections.abc import Callable

    from benches.peers.servers import Opening

Figures = dict[str, dict[str, list[float]]]
FILE = "fio on the file"


class Scale(NamedTuple):
    """Bytes of a volume, seconds of a load and of what precedes it, repetitions, servers,
    connections, and policies of the mirror."""

    volume: int
    seconds: int
    warm: int
    repetitions: int
    servers: tuple[str, ...]
    jobs: tuple[int, ...]
    policies: tuple[str, ...]


BRIEF = Scale(32 * MIB, 1, 0, 1, (OURS, "nbdkit"), (1,), ("flush",))
FULL = Scale(512 * MIB, 3, 2, 5, tuple(SERVERS), (1, 4), ("flush", "write", "async"))


class Load(NamedTuple):
    """What fio does, and how many do it."""

    pattern: str
    depth: int
    jobs: int = 1


def fio(target: list[str], load: Load, seconds: int, directory: Path) -> dict[str, float]:
    """Requests of 4 KiB a second, and the median latency of one in microseconds."""
    words = [
        "fio",
        "--name=job",
        *target,
        f"--rw={load.pattern}",
        "--bs=4k",
        f"--iodepth={load.depth}",
        f"--numjobs={load.jobs}",
        "--group_reporting=1",
        "--lat_percentiles=1",
        "--thread=1",
        "--size=100%",
        "--norandommap=1",
        "--time_based=1",
        f"--runtime={seconds}",
        "--output-format=json",
        f"--aux-path={directory}",
    ]
    printed = run(words).stdout
    (job,) = json.loads(printed[printed.index("{") :])["jobs"]
    side = job["write" if "write" in load.pattern else "read"]
    median = side["lat_ns"]["percentile"]["50.000000"] / 1000
    return {"rate": float(side["iops"]), "count": float(side["total_ios"]), "median": median}


def over_nbd(serving: Serving) -> list[str]:
    """fio's words for an export."""
    return ["--ioengine=nbd", f"--uri={serving.uri}"]


def timed(work: Callable[[], object]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


class Bench:
    """What is measured, and what was found so far."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.figures: Figures = defaultdict(lambda: defaultdict(list))
        self.loads: list[float] = []
        self.tls = trustme.CA()

    def add(self, label: str, name: str, value: float) -> None:
        """One more figure."""
        self.figures[label][name].append(value)

    def servers(self) -> list[tuple[str, Opening]]:
        """Those that are compared."""
        return [(name, SERVERS[name]) for name in self.scale.servers]

    def random(self, label: str, name: str, serving: Serving, load: Load, place: Place) -> None:
        """A rate, and what it cost the server."""
        # Once unmeasured: what was never written is written, caches are warm.
        if self.scale.warm:
            fio(over_nbd(serving), load, self.scale.warm, place.directory)
        before = serving.cpu_seconds()
        found = fio(over_nbd(serving), load, self.scale.seconds, place.directory)
        used = serving.cpu_seconds() - before
        if load.depth == 1:
            self.add(f"{label}, median us (less is better)", name, found["median"])
            return
        self.add(f"{label}, 1/s", name, found["rate"])
        self.add(f"{label}, CPU us each (less is better)", name, used / found["count"] * 1e6)

    def streams(self, label: str, name: str, serving: Serving, place: Place) -> None:
        """All of the volume out, and in."""
        seconds = timed(partial(run, ["nbdcopy", serving.uri, "null:"]))
        self.add(f"{label} stream out, MiB/s", name, place.size / MIB / seconds)
        if place.tls is None:
            source = place.directory / "source.img"
            piece = os.urandom(MIB)
            with source.open("wb") as file:
                for _ in range(0, place.size, MIB):
                    file.write(piece)
            seconds = timed(partial(run, ["nbdcopy", source, serving.uri]))
            self.add(f"{label} stream in, MiB/s", name, place.size / MIB / seconds)
            source.unlink()

    def small_stream(self, label: str, name: str, serving: Serving, place: Place) -> None:
        """4 KiB requests, 32 under way, by nbdcopy: fio cannot be told of certificates."""
        before = serving.cpu_seconds()
        words = ["--connections=1", "--threads=1", "--requests=32", "--request-size=4096"]
        seconds = timed(partial(run, ["nbdcopy", *words, serving.uri, "null:"]))
        count = place.size / 4096
        self.add(f"{label}, 1/s", name, count / seconds)
        used = serving.cpu_seconds() - before
        self.add(f"{label}, CPU us each (less is better)", name, used / count * 1e6)

    def memory_at(self, name: str, serving: Serving, connections: int) -> None:
        """What the server holds while so many connections have been at work."""
        words = ["nbdcopy", f"--connections={connections}", f"--threads={connections}"]
        run([*words, serving.uri, "null:"])
        label = f"memory after {connections} connections, MiB (less is better)"
        self.add(label, name, serving.memory_bytes() / MIB)

    def in_memory(self) -> None:
        """Everything that the page cache answers."""
        for name, server in self.servers():
            with tempfile.TemporaryDirectory(dir=MEMORY) as scratch, ExitStack() as stack:
                place = Place(Path(scratch), self.scale.volume)
                serving = stack.enter_context(server(place))
                for jobs in self.scale.jobs:
                    for pattern in ("randread", "randwrite"):
                        label = f"memory {pattern} 32 x {jobs}"
                        self.random(label, name, serving, Load(pattern, 32, jobs), place)
                self.random("memory randread 1 x 1", name, serving, Load("randread", 1), place)
                self.streams("memory", name, serving, place)
                self.memory_at(name, serving, 16)

    def on_disk(self) -> None:
        """Past the page cache."""
        for name, server in self.servers():
            if name in {"nbdkit", "nbd-server"}:
                continue  # They know no direct I/O: what they measure is the page cache.
            with tempfile.TemporaryDirectory(dir=DISK) as scratch, ExitStack() as stack:
                place = Place(Path(scratch), self.scale.volume, direct=True)
                serving = stack.enter_context(server(place))
                for pattern in ("randread", "randwrite"):
                    self.random(f"disk {pattern} 32 x 1", name, serving, Load(pattern, 32), place)
        with tempfile.TemporaryDirectory(dir=DISK) as scratch:
            place = Place(Path(scratch), self.scale.volume)
            place.fill()
            target = ["--ioengine=io_uring", "--direct=1", f"--filename={place.file}"]
            for pattern in ("randread", "randwrite"):
                if self.scale.warm:
                    fio(target, Load(pattern, 32), self.scale.warm, place.directory)
                found = fio(target, Load(pattern, 32), self.scale.seconds, place.directory)
                self.add(f"disk {pattern} 32 x 1, 1/s", FILE, found["rate"])

    def over_tls(self) -> None:
        """What the page cache answers, encrypted."""
        for name, server in self.servers():
            if name == "nbd-server":
                continue  # Its client side of TLS in a URI is what libnbd cannot agree on with it.
            with tempfile.TemporaryDirectory(dir=MEMORY) as scratch, ExitStack() as stack:
                pki = write_pki(Path(scratch) / "pki", self.tls, self.tls)
                place = Place(Path(scratch), self.scale.volume, tls=pki)
                serving = stack.enter_context(server(place))
                self.small_stream("TLS read 32 x 1", name, serving, place)
                self.streams("TLS", name, serving, place)

    def with_mirror(self) -> None:
        """Writes that a backup on this machine gets as well."""
        label = "mirrored randwrite 32 x 1"
        for policy in self.scale.policies:
            with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
                place = Place(Path(scratch), self.scale.volume)
                with mirrored(place, policy) as serving:
                    load = Load("randwrite", 32)
                    self.random(label, f"{OURS} {policy}", serving, load, place)
        with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
            place = Place(Path(scratch), self.scale.volume)
            with SERVERS[OURS](place) as serving:
                self.random(label, OURS, serving, Load("randwrite", 32), place)

    def places(self) -> dict[str, Callable[[], None]]:
        """By name."""
        return {
            "memory": self.in_memory,
            "disk": self.on_disk,
            "tls": self.over_tls,
            "mirror": self.with_mirror,
        }

    def medians(self) -> dict[str, dict[str, float]]:
        """By label and server."""
        return {
            label: {name: statistics.median(values) for name, values in by_name.items()}
            for label, by_name in self.figures.items()
        }


def report(bench: Bench) -> str:
    """A table: medians, and how ours compares with each."""
    lines = [f"load before each repetition: {', '.join(f'{load:.1f}' for load in bench.loads)}"]
    for label, by_name in bench.medians().items():
        lines.append(label)
        ours = by_name[OURS]
        for name, median in by_name.items():
            ratio = "" if name == OURS else f"   ours / {name} = {ours / median:.2f}"
            lines.append(f"  {name:20} {median:12,.1f}{ratio}")
    return "\n".join(lines)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brief", action="store_true", help="small and short, so that none rots")
    parser.add_argument("--json", action="store_true", help="print medians as JSON")
    parser.add_argument("--only", nargs="+", choices=("memory", "disk", "tls", "mirror"))
    parser.add_argument("--repetitions", type=int)
    chosen = parser.parse_args()
    scale = BRIEF if chosen.brief else FULL
    if chosen.repetitions:
        scale = scale._replace(repetitions=chosen.repetitions)
    bench = Bench(scale)
    for _ in range(scale.repetitions):
        for name, measure in bench.places().items():
            if chosen.only is None or name in chosen.only:
                bench.loads.append(os.getloadavg()[0])
                measure()
    print(json.dumps(bench.medians(), indent=2) if chosen.json else report(bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
