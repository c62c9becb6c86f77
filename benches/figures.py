"""The figures that the product promises, measured on this machine: `python -m benches.figures`.

| figure | promised |
|---|---|
| `dualrestore --version` | under 150 ms |
| opening for business after the loss of a 16 TiB volume | under 1 s |
| memory of the primary's daemon then | under 64 MiB and the maps that were touched |
| a demand fetch, median | the link's round trip and at most 1 ms |
| the demo at its defaults | under 60 s on 2 cores |

Wants a quiet machine. Prints what it found and judges nothing: the exit code says only whether
everything ran. `--brief` runs everything small, so that it does not rot; `--json` for machines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests.e2e.harness import MIB, VOLUME, Pair, dualrestore, wait_until
from tests.e2e.nbd_client import NbdClient

GIB = 1 << 30
TIB = 1 << 40
BLOCK = 4096
MEMORY = "/dev/shm"
"""Sparse files of 16 TiB fit there; ext4 takes them up to a block less."""


class Scale(NamedTuple):
    """How much of each is done."""

    starts: int
    opened_bytes: int
    fetches: int
    demo: tuple[str, ...]


FULL = Scale(21, 16 * TIB, 500, ())
BRIEF = Scale(3, TIB, 50, ("--size", "64MiB"))


class Figure(NamedTuple):
    """What was measured, and what is promised for the full scale."""

    what: str
    measured: str
    promised: str


def start_of_the_command_line(scale: Scale) -> list[Figure]:
    """What a status check pays before it begins."""
    seconds = []
    for _ in range(scale.starts):
        begun = time.perf_counter()
        dualrestore("--version")
        seconds.append(time.perf_counter() - begun)
    return [
        Figure("dualrestore --version", f"{statistics.median(seconds) * 1e3:.0f} ms", "150 ms"),
    ]


def memory_of(process_id: int) -> int:
    """Bytes of memory that the process has."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"process {process_id} has no memory")


def put_in_a_new_disk(pair: Pair) -> None:
    """An empty one in the place of the lost one."""
    pair.primary_device.unlink()
    with pair.primary_device.open("wb") as disk:
        disk.truncate(pair.size)


def opening_after_a_loss(scale: Scale) -> list[Figure]:
    """A new disk, the operator's word, the first block that comes over the link."""
    size = f"{scale.opened_bytes // TIB} TiB"
    with Pair(scale.opened_bytes, place=MEMORY) as pair:
        with NbdClient(pair.socket, VOLUME) as client:
            client.write(TIB // 2, b"\x5a" * BLOCK)
            client.flush()
        wait_until("mirrored", lambda: bool(pair.primary.status()["mirrored"]))
        pair.primary.stop()
        put_in_a_new_disk(pair)
        begun = time.perf_counter()
        pair.primary.start()
        started = time.perf_counter()
        pair.primary.verb("restore", VOLUME, "--lost", "all")
        with NbdClient(pair.socket, VOLUME) as client:
            assert client.read(TIB // 2, BLOCK) == b"\x5a" * BLOCK
            opened = time.perf_counter()
            assert pair.primary.process is not None
            memory = memory_of(pair.primary.process.pid)
    return [
        Figure(f"start of the daemon, {size}", f"{started - begun:.2f} s", ""),
        Figure(
            f"`restore` until a missing block is read, {size}", f"{opened - started:.2f} s", "1 s"
        ),
        Figure(f"memory of the daemon then, {size}", f"{memory / MIB:.0f} MiB", "64 MiB and maps"),
    ]


def demand_fetch(scale: Scale) -> list[Figure]:
    """Reads of missing blocks, one at a time, over the loopback, whose round trip is nothing."""
    with Pair(GIB, place=MEMORY) as pair:
        pair.primary.stop()
        put_in_a_new_disk(pair)
        pair.primary.start()
        pair.primary.verb("restore", VOLUME, "--lost", "all")
        seconds = []
        with NbdClient(pair.socket, VOLUME) as client:
            client.read(0, BLOCK)
            step = GIB // (scale.fetches + 1) // BLOCK * BLOCK
            for number in range(1, scale.fetches + 1):
                begun = time.perf_counter()
                client.read(number * step, BLOCK)
                seconds.append(time.perf_counter() - begun)
    median = f"{statistics.median(seconds) * 1e3:.2f} ms"
    return [Figure("demand fetch over the loopback, median", median, "1 ms")]


def demo(scale: Scale) -> list[Figure]:
    """The whole method, over its shaped link."""
    report = json.loads(dualrestore("demo", *scale.demo, "--json").stdout)
    fetch, trip = report["fetch_ms_median"], report["link_round_trip_ms"]
    place = " ".join(scale.demo) or "at its defaults"
    return [
        Figure("demand fetch in the demo, median", f"{fetch:.1f} ms", f"{trip:.1f} ms + 1 ms"),
        Figure("opening in the demo", f"{report['open_seconds']:.2f} s", "1 s"),
        Figure(f"demo {place}", f"{report['seconds_total']:.1f} s", "60 s"),
    ]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--brief", action="store_true", help="small and short, so that none rots")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    chosen = parser.parse_args()
    scale = BRIEF if chosen.brief else FULL
    figures = []
    for measure in (start_of_the_command_line, opening_after_a_loss, demand_fetch, demo):
        figures += measure(scale)
    if chosen.json:
        print(json.dumps([figure._asdict() for figure in figures], indent=2))
    else:
        for figure in figures:
            print(f"{figure.what:52} {figure.measured:>10}   promised: {figure.promised or '-'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
