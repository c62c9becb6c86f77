"""What a snapshot costs writes, beside QEMU's copy-before-write: `python -m benches.bulk.snapshot`.

| pass | what |
|---|---|
| none | no snapshot |
| first | every write goes to a block that is not preserved yet |
| later | the same blocks once more |
| bare | of large writes: old bytes read and written elsewhere, new ones written, and nothing else |

Each pass ends with a flush that is part of its time. Compared are the ratios of `first` and
`later` to `none`, each tool with itself: we are driven as the link drives a backup, QEMU through
NBD by fio. QEMU preserves clusters of 64 KiB and says nothing durable of them: its snapshot ends
with its process, ours survives a loss of power at any moment. All repetitions are interleaved;
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benches.bulk.run import ROOT, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
FIGURES = re.compile(r"(none|first|later|bare) +([0-9.]+) ")
BARS = {"first": 0.40, "later": 0.95}


class Load(NamedTuple):
    """As a load of `snapshot.rs` is called, and what fio is told."""

    name: str
    fio: tuple[str, ...]
    share: int
    """One part in so many of the volume is written."""


LOADS = (
    Load("4 KiB random, depth 32", ("--rw=randwrite", "--bs=4k", "--iodepth=32"), 16),
    Load("1 MiB sequential", ("--rw=write", "--bs=1m", "--iodepth=16"), 1),
)
Passes = dict[str, float]
"""MiB/s of each pass."""


def ours(place: Path, load: Load, size: int) -> Passes:
    program = ROOT / "target" / "release" / "bulk_snapshot"
    words = [str(program), str(place), str(size // MIB), "1", load.name]
    told = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return {name: float(rate) for name, rate in FIGURES.findall(told)}


def node(name: str, path: Path) -> list[str]:
    """Block nodes of QEMU that lead to a file past the page cache."""
    file = f"driver=file,node-name={name}-file,filename={path},cache.direct=on,aio=native"
    return ["--blockdev", file, "--blockdev", f"driver=raw,node-name={name},file={name}-file"]


@contextlib.contextmanager
def exported(place: Path, *, snapshot: bool) -> Iterator[str]:
    """The mirror as QEMU serves it; the URI."""
    socket, store = place / "qemu.sock", place / "store"
    words = ["qemu-storage-daemon", *node("mirror", place / "mirror")]
    served = "mirror"
    if snapshot:
        with store.open("wb") as file:
            file.truncate((place / "mirror").stat().st_size)
        filtered = "driver=copy-before-write,node-name=filter,file=mirror,target=store"
        words += [*node("store", store), "--blockdev", filtered]
        served = "filter"
    words += ["--nbd-server", f"addr.type=unix,addr.path={socket}"]
    words += ["--export", f"type=nbd,id=e,node-name={served},name=v,writable=on"]
    with subprocess.Popen(words) as process:
        try:
            while not socket.exists():
                assert process.poll() is None, "qemu-storage-daemon does not serve"
                time.sleep(0.01)
            yield f"nbd+unix:///v?socket={socket}"
        finally:
            process.terminate()
            process.wait()
            for path in (socket, store):
                path.unlink(missing_ok=True)


def written(place: Path, uri: str, load: Load, size: int) -> float:
    """MiB/s of one pass, its flush counted."""
    out = place / "fio.json"
    words = ["fio", "--name=pass", "--ioengine=nbd", f"--uri={uri}", *load.fio, f"--size={size}"]
    words += [f"--io_size={size // load.share}", "--end_fsync=1", "--randseed=1"]
    begun = time.perf_counter()
    subprocess.run(
        [*words, "--output-format=json", f"--output={out}"], check=True, capture_output=True
    )
    seconds = time.perf_counter() - begun
    told: int = json.loads(out.read_text())["jobs"][0]["job_runtime"]
    # Without the start of the program.
    return size / load.share / MIB / min(seconds, told / 1000)


def qemu(place: Path, load: Load, size: int) -> Passes:
    """The same passes through QEMU."""
    if not (place / "mirror").exists():
        noise(place / "mirror", size)
    with exported(place, snapshot=False) as uri:
        none = written(place, uri, load, size)
    with exported(place, snapshot=True) as uri:
        first = written(place, uri, load, size)
        later = written(place, uri, load, size)
    return {"none": none, "first": first, "later": later}


def report(load: Load, tool: str, runs: list[Passes]) -> None:
    """One line: medians of the rates, and of the ratios within each repetition."""
    rates = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    ratios = {name: statistics.median(run[name] / run["none"] for run in runs) for name in rates}
    shown = [f"{name} {rate:8.1f} ({ratios[name]:.2f})" for name, rate in rates.items()]
    print(f"{load.name:24} {tool:5} {'  '.join(shown)}", flush=True)


def main() -> int:
    """Measures, and judges nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="of the volume, a power of two")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--place", default="/var/tmp")
    options = parser.parse_args()
    build = ["cargo", "build", "--quiet", "--release", "-p", "dualrestore-benches"]
    subprocess.run([*build, "--bin", "bulk_snapshot"], check=True, cwd=ROOT)
    size = options.mib * MIB
    print(f"{os.cpu_count()} processors, {options.mib} MiB, medians of {options.times}; MiB/s")
    place = Path(tempfile.mkdtemp(prefix="dr-snapshot-", dir=options.place))
    try:
        for load in LOADS:
            tools = {"ours": ours, "qemu": qemu}
            runs: dict[str, list[Passes]] = {tool: [] for tool in tools}
            for _ in range(options.times):
                for tool, measure in tools.items():
                    runs[tool].append(measure(place, load, size))
            for tool in tools:
                report(load, tool, runs[tool])
    finally:
        shutil.rmtree(place)
    print(f"bars: first {BARS['first']:.2f}, later {BARS['later']:.2f} of none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
