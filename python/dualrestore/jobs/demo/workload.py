"""A verifying workload through an NBD export, in a process of its own.

Reads and writes stamped sectors from several connections, each the owner of its stripes, and reads
the filesystem beside them. Every read is compared: stamped sectors with a shadow of the last
acknowledged writes, the rest with the image from before the loss.

Spoken on pipes, one JSON document a line: the options come first on standard input, anything after
them (or its end) means stop; counters go out four times a second, the last ones as `final`.
Does not know: what a volume is made of.
"""

import json
import os
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy

from dualrestore.config import UnixExport
from dualrestore.errors import DualRestoreError
from dualrestore.jobs.demo.stamps import SECTOR_BYTES, Findings, examine, stamp
from dualrestore.transport.nbd_client import NbdClient

STRIPE_BYTES = 256 * 1024
BLOCK_BYTES = 4096
TELL_SECONDS = 0.25
PACE_SECONDS = 0.002
"""The least time of one operation of one connection: the machine has others to serve."""
SAMPLES_MAX = 50_000


@dataclass(frozen=True)
class Options:
    """What to work on. `area_*` hold stamped sectors; before them lies the filesystem."""

    socket: str
    export: str
    image: str
    area_offset: int
    area_bytes: int
    write_bytes_per_second: float
    seed: int
    shadow: str
    connections: int = 12


@dataclass
class Counters:
    """What happened; also of all connections together."""

    reads: int = 0
    bytes_read: int = 0
    acknowledged_writes: int = 0
    bytes_written: int = 0
    flushes: int = 0
    stale_reads: int = 0
    wrong_reads: int = 0
    read_ms_median: float = 0.0
    read_ms_p99: float = 0.0
    errors: list[str] = field(default_factory=list)


class Worker(threading.Thread):
    """One connection and its stripes."""

    def __init__(
        self, options: Options, number: int, shadow: "numpy.ndarray[Any, numpy.dtype[Any]]"
    ) -> None:
        super().__init__(name=f"workload-{number}", daemon=True)
        self.counters = Counters()
        self.latencies: list[float] = []
        self.stopping = threading.Event()
        self._options = options
        self._number = number
        self._shadow = shadow
        self._chance = random.Random(options.seed * 1000 + number)  # noqa: S311 - not a secret
        self._sequence = 1
        stripes = options.area_bytes // STRIPE_BYTES
        self._stripes = range(number, stripes, options.connections)
        self._write_seconds = options.connections / options.write_bytes_per_second

    def run(self) -> None:
        options = self._options
        try:
            with (
                NbdClient(UnixExport(Path(options.socket)), options.export) as client,
                Path(options.image).open("rb") as image,
            ):
                while not self.stopping.is_set():
                    began = time.monotonic()
                    pause = self._one(client, image.fileno())
                    spent = time.monotonic() - began
                    self.stopping.wait(max(pause, PACE_SECONDS) - spent)
                client.flush()
        except (DualRestoreError, OSError) as problem:
            self.counters.errors.append(f"connection {self._number}: {problem}")

    def _place(self, length: int, unit: int) -> int:
        # Half of the work goes to a tenth of the stripes, as with real applications.
        hot = max(1, len(self._stripes) // 10)
        some = self._stripes[:hot] if self._chance.random() < 0.5 else self._stripes
        stripe = some[self._chance.randrange(len(some))]
        within = self._chance.randrange((STRIPE_BYTES - length) // unit + 1) * unit
        return self._options.area_offset + stripe * STRIPE_BYTES + within

    def _one(self, client: NbdClient, image: int) -> float:
        """One operation; returns the least seconds that it should take."""
        choice = self._chance.random()
        if choice < 0.30:
            return self._write(client, self._chance.choice((1, 1, 2, 4, 16)) * BLOCK_BYTES, 4096)
        if choice < 0.45:
            return self._write(client, self._chance.randrange(1, 8) * SECTOR_BYTES, SECTOR_BYTES)
        if choice < 0.48:
            return self._zero(client)
        if choice < 0.80:
            self._read(client)
        elif choice < 0.97:
            self._read_filesystem(client, image)
        else:
            client.flush()
            self.counters.flushes += 1
        return 0.0

    def _sectors(self, offset: int, length: int) -> tuple[int, int]:
        return offset // SECTOR_BYTES, length // SECTOR_BYTES

    def _expected(self, first: int, count: int) -> "numpy.ndarray[Any, numpy.dtype[Any]]":
        start = first - self._options.area_offset // SECTOR_BYTES
        return self._shadow[start : start + count]

    def _write(self, client: NbdClient, length: int, unit: int) -> float:
        offset = self._place(length, unit)
        first, count = self._sectors(offset, length)
        self._sequence += 1
        sectors = numpy.arange(first, first + count, dtype=numpy.uint64)
        sequences = numpy.full(count, self._sequence, dtype=numpy.uint64)
        forced = self._chance.random() < 0.05
        data = stamp(sectors, sequences).tobytes()
        client.write(offset, data, force_unit_access=forced)
        self._expected(first, count)[:] = self._sequence
        self.counters.acknowledged_writes += 1
        self.counters.bytes_written += length
        return length * self._write_seconds

    def _zero(self, client: NbdClient) -> float:
        length = 4 * BLOCK_BYTES
        offset = self._place(length, BLOCK_BYTES)
        client.write_zeroes(offset, length)
        self._expected(*self._sectors(offset, length))[:] = 0
        self.counters.acknowledged_writes += 1
        self.counters.bytes_written += length
        return length * self._write_seconds

    def _timed_read(self, client: NbdClient, offset: int, length: int) -> bytes:
        began = time.monotonic()
        data = client.read(offset, length)
        if len(self.latencies) < SAMPLES_MAX:
            self.latencies.append(time.monotonic() - began)
        self.counters.reads += 1
        self.counters.bytes_read += length
        return data

    def _read(self, client: NbdClient) -> None:
        length = self._chance.choice((1, 8, 8, 32, 128)) * SECTOR_BYTES
        offset = self._place(length, SECTOR_BYTES)
        first, count = self._sectors(offset, length)
        data = self._timed_read(client, offset, length)
        self._count(examine(data, first, self._expected(first, count)))

    def _read_filesystem(self, client: NbdClient, image: int) -> None:
        length = self._chance.choice((1, 2, 4, 16)) * BLOCK_BYTES
        blocks = (self._options.area_offset - length) // BLOCK_BYTES
        offset = self._chance.randrange(blocks) * BLOCK_BYTES
        if self._timed_read(client, offset, length) != os.pread(image, length, offset):
            self._count(Findings(wrong=1))

    def _count(self, findings: Findings) -> None:
        self.counters.stale_reads += findings.stale
        self.counters.wrong_reads += findings.wrong


def total(workers: list[Worker]) -> Counters:
    """The counters of all connections together."""
    whole = Counters()
    for worker in workers:
        part = worker.counters
        whole.reads += part.reads
        whole.bytes_read += part.bytes_read
        whole.acknowledged_writes += part.acknowledged_writes
        whole.bytes_written += part.bytes_written
        whole.flushes += part.flushes
        whole.stale_reads += part.stale_reads
        whole.wrong_reads += part.wrong_reads
        whole.errors += part.errors
    samples = [latency for worker in workers for latency in worker.latencies]
    if samples:
        median, p99 = numpy.percentile(samples, [50, 99]) * 1000
        whole.read_ms_median, whole.read_ms_p99 = round(float(median), 3), round(float(p99), 3)
    return whole


def work(options: Options, commands: TextIO, told: TextIO) -> None:
    """Runs until a command comes; leaves the shadow behind."""
    sectors = options.area_bytes // SECTOR_BYTES
    shadow = numpy.ones(sectors, dtype=numpy.uint64)
    workers = [Worker(options, number, shadow) for number in range(options.connections)]
    stop = threading.Event()

    def listen() -> None:
        commands.readline()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    for worker in workers:
        worker.start()

    def tell(counters: Counters, key: str) -> None:
        told.write(json.dumps({key: asdict(counters)}) + "\n")
        told.flush()

    while not stop.wait(TELL_SECONDS):
        tell(total(workers), "counters")
    for worker in workers:
        worker.stopping.set()
    for worker in workers:
        worker.join()
    with Path(options.shadow).open("wb") as out:
        numpy.save(out, shadow)
    tell(total(workers), "final")


def main() -> None:
    """The process: options on standard input, counters on standard output."""
    options = Options(**json.loads(sys.stdin.readline()))
    work(options, sys.stdin, sys.stdout)


if __name__ == "__main__":
    main()
