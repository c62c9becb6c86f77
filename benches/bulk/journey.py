"""A large, mostly empty volume goes the whole way of the bulk channel without a hand being lent:
`python -m benches.bulk.journey [--size 1TiB] [--data 4GiB]`.

Filled and mirrored, its disk lost, cut, bundled over two media, attached and read from, merged,
verified; at the end every piece is read back and compared with what was written. Two daemons, all
of it on this machine. Of each step: seconds, and the most memory that each daemon had meanwhile
(the step's own peak; files in the page cache do not count). Promised are 160 MiB beside the pages
of maps that were touched, whatever the size of the volume. `--json` for machines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benches.figures import put_in_a_new_disk
from dualrestore.sizes import format_size, parse_size
from tests.e2e.harness import MIB, PROGRAM, VOLUME, Daemon, Pair, run
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 16 * MIB
"""The data lies in pieces of so many bytes, evenly spread over the volume."""
REQUEST = 4 * MIB
SLACK = 32 * MIB
"""A medium's other files, with room to spare."""
PATIENCE_SECONDS = 24 * 3600


class Step(NamedTuple):
    """What one step took."""

    name: str
    seconds: float
    primary_peak: int
    backup_peak: int
    note: str


def _peak(daemon: Daemon) -> int:
    """The most memory that a daemon had since `_forget_peak`, in bytes."""
    process = daemon.process
    assert process is not None
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("a process without memory")


def _forget_peak(daemon: Daemon) -> None:
    process = daemon.process
    assert process is not None
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")


def verb(daemon: Daemon, *words: str | Path) -> dict[str, Any]:
    """What a verb prints with `--json`, however long it takes."""
    command = [PROGRAM, "-c", daemon.configuration, *words, "--json"]
    finished = run(command, seconds=PATIENCE_SECONDS)
    printed: dict[str, Any] = json.loads(finished.stdout)
    return printed


class Journey:
    """The volume, its pieces and what was measured."""

    def __init__(self, pair: Pair, data: int) -> None:
        self.pair = pair
        count = max(2, data // PIECE)
        # Not where pages of maps begin, nor at multiples of the larger units.
        self.places = [pair.size * at // count // 4096 * 4096 for at in range(count)]
        self.digests: dict[int, bytes] = {}
        self.steps: list[Step] = []
        self.note = ""

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures one step."""
        daemons = (self.pair.primary, self.pair.backup)
        for daemon in daemons:
            _forget_peak(daemon)
        self.note, begun = "", time.perf_counter()
        yield
        seconds = time.perf_counter() - begun
        primary, backup = (_peak(one) for one in daemons)
        self.steps.append(Step(name, seconds, primary, backup, self.note))
        show(self.steps[-1])

    def write(self) -> None:
        with NbdClient(self.pair.socket, VOLUME) as client:
            for place in self.places:
                content = os.urandom(PIECE)
                self.digests[place] = hashlib.blake2b(content).digest()
                for at in range(0, PIECE, REQUEST):
                    client.write(place + at, content[at : at + REQUEST])
            client.flush()

    def check(self, places: list[int]) -> None:
        with NbdClient(self.pair.socket, VOLUME) as client:
            for place in places:
                parts = (client.read(place + at, REQUEST) for at in range(0, PIECE, REQUEST))
                found = hashlib.blake2b(b"".join(parts)).digest()
                assert found == self.digests[place], f"the piece at {place} is not what it was"

    def mirrored(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.pair.primary.status()["mirrored"]:
            assert time.monotonic() < deadline, "not mirrored within a day"
            time.sleep(0.2)

    def go(self) -> None:
        """All of it."""
        pair, media = self.pair, [self.pair.directory / name for name in ("m1", "m2")]
        primary, backup = pair.primary, pair.backup
        with self.step("filled and mirrored"):
            self.write()
            self.mirrored()
            self.note = f"{format_size(len(self.places) * PIECE)} of data"
        primary.stop()
        put_in_a_new_disk(pair)
        primary.start()
        with self.step("opened after the loss"):
            verb(primary, "restore", VOLUME, "--lost", "all")
        with self.step("cut"):
            snapshot = verb(primary, "snapshot", VOLUME)["snapshot"]
        with self.step("bundled over two media"):
            room = len(self.places) * PIECE // 2 + SLACK
            to = [word for medium in media for word in ("--to", medium)]
            report = verb(
                backup, "bundle", "create", f"{VOLUME}@{snapshot}", *to, "--medium-size", str(room)
            )
            assert report["media"] == 2, report
            self.note = f"{format_size(report['bytes_stored'])} stored"
        with self.step("attached, some read from them"):
            verb(primary, "attach", *media, VOLUME)
            self.check(self.places[:: max(1, len(self.places) // 16)])
            supplied = primary.status()["bytes_from_media"]
            assert supplied > 0
            self.note = f"{format_size(supplied)} from media"
        with self.step("merged"):
            written = 0
            for medium in media:
                written += verb(primary, "merge", medium, VOLUME)["bytes_written"]
            self.note = f"{format_size(written)} written"
        with self.step("mirrored and verified"):
            self.mirrored()
            verb(primary, "verify", VOLUME)
        with self.step("read back"):
            self.check(self.places)
        used = pair.primary_device.stat().st_blocks * 512
        assert used < 2 * len(self.places) * PIECE + SLACK, "what was a hole is one still"


def show(step: Step) -> None:
    """One line."""
    print(
        f"{step.name:32} {step.seconds:9.1f} s   primary {format_size(step.primary_peak):>10}, "
        f"backup {format_size(step.backup_peak):>10}   {step.note}",
        flush=True,
    )


def main() -> int:
    """Goes there, and says how it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1TiB", help="of the volume")
    parser.add_argument("--data", default="4GiB", help="of what is in it")
    parser.add_argument(
        "--place", default="/var/tmp", help="a directory with room for 5 x the data"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with Pair(parse_size(options.size), place=options.place) as pair:
        journey = Journey(pair, parse_size(options.data))
        journey.go()
    if options.json:
        print(json.dumps([step._asdict() for step in journey.steps]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
