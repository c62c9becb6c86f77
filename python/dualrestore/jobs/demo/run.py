"""The demo: lose a disk, open for business over a thin link, merge a shipped bundle, prove it.

| stage | what happens |
|---|---|
| content | an image: a filesystem with real files, then stamped sectors |
| mirror | written through the primary's NBD export and mirrored; the link is not yet shaped |
| loss | primary stopped, its device overwritten with garbage, primary started |
| open | `restore --lost all`; the clock stops when the first missing block was read |
| live | the verifying workload runs from here on, over the thin link |
| snapshot | a cut at the backup |
| bundle | the bundle is written at the backup, the workload goes on |
| merge | merged at the primary under the workload |
| drain | workload ended, queues drained, digests of both sides compared |
| proof | daemons stopped; both files compared with each other, the shadow and the image |

Guarantees: the report says `proven` only if nothing was lost, stale or different. The rate and
delay hold from `loss` on; only the first mirroring is unshaped, which the report's `link_bytes` do
not count. Does not know: how it is shown.
"""

import contextlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from dualrestore.config import UnixExport
from dualrestore.errors import DualRestoreError, UsageError
from dualrestore.jobs.demo.image import (
    Content,
    check_filesystem,
    data_runs,
    make_content,
    overwrite_with_garbage,
)
from dualrestore.jobs.demo.processes import Daemon, WorkloadProcess, free_address
from dualrestore.jobs.demo.stamps import SECTOR_BYTES, Findings, examine
from dualrestore.jobs.demo.workload import Options as WorkloadOptions
from dualrestore.model import MergeReport, Record, VerifyReport, read
from dualrestore.sizes import format_size
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_client import NbdClient
from dualrestore.transport.shaper import ShapedLink, measure_round_trip

SIZE_MIN = 64 * 2**20
BLOCK_BYTES = 4096
SEED_BYTES = 2**20
SEED_IN_FLIGHT = 8
PROBES = 15
"""Single reads of missing blocks, one after the other, for the median cost of a fetch."""
LIVE_SECONDS = 4.0
AFTER_SECONDS = 1.0
SETTLE_SECONDS = 60.0
WRITE_SHARE = 0.2
"""Of the link's rate, for the workload's writes: a workload that fills the link proves less."""
POLL_SECONDS = 0.1
COMPARE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class DemoOptions:
    """Bytes, bytes a second, seconds (each way)."""

    size: int
    directory: Path | None
    link_rate: float
    link_delay: float
    keep: bool = False
    seed: int = 1


class DemoReport(Record, frozen=True, kw_only=True):
    """What was done and whether it is proven."""

    proven: bool
    problems: list[str]
    filesystem: str
    files: int
    volume_bytes: int
    open_seconds: float
    fetch_ms_median: float
    link_round_trip_ms: float
    acknowledged_writes: int
    reads: int
    read_ms_median: float
    read_ms_p99: float
    lost_writes: int
    stale_reads: int
    wrong_reads: int
    mismatched_blocks: int
    bytes_fetched: int
    bytes_written_live: int
    bytes_merged: int
    bytes_skipped_current: int
    link_bytes: int
    primary_rss_bytes: int
    backup_rss_bytes: int
    filesystem_clean: bool | None
    seconds_total: float
    seconds: dict[str, float]
    directory: str | None


@dataclass
class Scene:
    """What an observer may look at while the demo runs."""

    stage: str = ""
    primary: dict[str, Any] = field(default_factory=dict)
    workload: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    link_bytes: int = 0


Observer = Callable[[Scene], None]


class Demo:
    """One run. `observe` is called from another thread, a few times a second."""

    def __init__(self, options: DemoOptions, observe: Observer) -> None:
        self.options = options
        self.scene = Scene()
        self._observe = observe
        self._seconds: dict[str, float] = {}
        self._cleanup = contextlib.ExitStack()
        self._workload: WorkloadProcess | None = None
        self._watched: Daemon | None = None

    def run(self) -> DemoReport:
        """All stages. On success the working directory is removed, unless `keep`."""
        options = self.options
        if options.size < SIZE_MIN or options.size % 2**20:
            raise UsageError(
                f"--size: expected at least {format_size(SIZE_MIN)} in whole MiB, "
                f"found {format_size(options.size, exact=True)}"
            )
        place = self._make_directory()
        sockets = Path(tempfile.mkdtemp(prefix="dualrestore-"))
        began = time.monotonic()
        with self._cleanup:
            self._cleanup.callback(shutil.rmtree, sockets, ignore_errors=True)
            report = self._run(place, sockets, began)
        if report.proven and not options.keep:
            shutil.rmtree(place, ignore_errors=True)
        return report

    def _make_directory(self) -> Path:
        parent = self.options.directory
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix="dualrestore-demo-", dir=parent))
        # The image, both devices, preserved blocks and the bundle, the first and last partly holes.
        needed, free = self.options.size * 4, shutil.disk_usage(place).free
        if free < needed:
            place.rmdir()
            raise UsageError(
                f"{place.parent}: expected {format_size(needed)} of free space, found "
                f"{format_size(free)}; choose another --dir or a smaller --size"
            )
        return place

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        self.scene.stage, self.scene.progress = name, {}
        self._observe(self.scene)
        yield
        self._seconds[name] = round(time.monotonic() - began, 3)

    def _run(self, place: Path, sockets: Path, began: float) -> DemoReport:
        options = self.options
        with self._stage("content"):
            content = make_content(place, options.size)
        with self._stage("mirror"):
            primary, backup, link = self._start(place, sockets)
            export = UnixExport(sockets / "demo.sock")
            self._seed(content, export)
            self._await_mirrored(primary)
            seeded = link.bytes_carried
        self._watch(primary, link, seeded)
        with self._stage("loss"):
            primary.stop()
            overwrite_with_garbage(place / "primary.img", options.size)
            link.shape(options.link_rate, options.link_delay)
            primary.start()
        with self._stage("open"):
            open_seconds, fetch_ms = self._open(primary, export, content)
            round_trip_ms = measure_round_trip(options.link_rate, options.link_delay) * 1000
        with self._stage("live"):
            workload = self._start_workload(export, content, place)
            self._pass_time(LIVE_SECONDS)
        merged = self._bulk(primary, backup, place)
        with self._stage("drain"):
            final, verified, last = self._drain(primary, workload)
        link_bytes = link.bytes_carried - seeded
        with self._stage("proof"):
            primary.stop()
            backup.stop()
            lost, mismatched = self._compare(place, content)
            clean = (
                check_filesystem(place / "primary.img") if content.filesystem == "ext4" else None
            )
        problems = _problems(final, verified, merged, last["missing_bytes"], clean)
        counts = (lost, final["stale_reads"], final["wrong_reads"], mismatched)
        proven = not problems and not any(counts)
        return DemoReport(
            proven=proven,
            problems=problems,
            filesystem=content.filesystem,
            files=content.files,
            volume_bytes=options.size,
            open_seconds=round(open_seconds, 4),
            fetch_ms_median=round(fetch_ms, 3),
            link_round_trip_ms=round(round_trip_ms, 3),
            acknowledged_writes=final["acknowledged_writes"],
            reads=final["reads"],
            read_ms_median=final["read_ms_median"],
            read_ms_p99=final["read_ms_p99"],
            lost_writes=lost,
            stale_reads=final["stale_reads"],
            wrong_reads=final["wrong_reads"],
            mismatched_blocks=mismatched,
            bytes_fetched=last["bytes_fetched"],
            bytes_written_live=last["bytes_written_live"],
            bytes_merged=merged.bytes_written,
            bytes_skipped_current=merged.bytes_skipped,
            link_bytes=link_bytes,
            primary_rss_bytes=primary.rss_bytes,
            backup_rss_bytes=backup.rss_bytes,
            filesystem_clean=clean,
            seconds_total=round(time.monotonic() - began, 3),
            seconds=self._seconds,
            directory=str(place) if self.options.keep or not proven else None,
        )

    def _drain(
        self, primary: Daemon, workload: WorkloadProcess
    ) -> tuple[dict[str, Any], VerifyReport, dict[str, Any]]:
        """The workload's last words, what `verify` found, the primary's last status."""
        self._pass_time(AFTER_SECONDS)
        final = workload.stop()
        self._await_mirrored(primary)
        told = primary.client.job("/v1/volumes/demo/verify", {}, self._progress)
        last = primary.status()
        self._watched = None
        return final, read(VerifyReport, told), last

    def _progress(self, counters: dict[str, int]) -> None:
        self.scene.progress = counters

    def _start(self, place: Path, sockets: Path) -> tuple[Daemon, Daemon, ShapedLink]:
        thread = LoopThread("dualrestore-link")
        self._cleanup.callback(thread.stop)
        far, near = free_address(), free_address()
        link = ShapedLink(thread, far)
        link.open(near)
        self._cleanup.callback(link.close)
        size = f'size = "{format_size(self.options.size, exact=True)}"\n'
        backup = Daemon(
            "backup",
            place,
            sockets,
            f'listen = "{far}"\n[volume.demo]\nrole = "backup"\n'
            f'device = "{place / "mirror.img"}"\n{size}',
        )
        primary = Daemon(
            "primary",
            place,
            sockets,
            f'[volume.demo]\nrole = "primary"\ndevice = "{place / "primary.img"}"\n{size}'
            f'backups = ["{near}/demo"]\nexport = ["unix:{sockets / "demo.sock"}"]\n',
        )
        for daemon in (backup, primary):
            self._cleanup.callback(daemon.stop, insist=False)
            daemon.start()
        self._await_mirrored(primary)
        return primary, backup, link

    def _await(self, what: str, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + SETTLE_SECONDS
        while not is_so():
            if time.monotonic() > until:
                raise DualRestoreError(f"expected {what} within {SETTLE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)

    def _await_mirrored(self, primary: Daemon) -> None:
        self._await("both sides to be mirrored", lambda: bool(primary.status()["mirrored"]))

    def _seed(self, content: Content, export: UnixExport) -> None:
        written = 0
        with NbdClient(export, "demo") as client, content.image.open("rb") as image:
            in_flight = 0
            for offset, length in data_runs(content.image):
                image.seek(offset)
                for at in range(offset, offset + length, SEED_BYTES):
                    data = image.read(min(SEED_BYTES, offset + length - at))
                    client.send_write(at, data)
                    written += len(data)
                    self._progress({"done_bytes": written, "total_bytes": content.size})
                    in_flight += 1
                    if in_flight == SEED_IN_FLIGHT:
                        client.receive()
                        in_flight -= 1
            for _ in range(in_flight):
                client.receive()
            client.flush()

    def _watch(self, primary: Daemon, link: ShapedLink, seeded: int) -> None:
        self._watched = primary
        ended = threading.Event()

        def look() -> None:
            while not ended.wait(0.25):
                self.scene.link_bytes = link.bytes_carried - seeded
                if self._workload is not None:
                    self.scene.workload = self._workload.counters
                if self._watched is not None:
                    with contextlib.suppress(DualRestoreError, OSError):
                        self.scene.primary = self._watched.status()
                self._observe(self.scene)

        watcher = threading.Thread(target=look, name="demo-watch", daemon=True)
        watcher.start()
        self._cleanup.callback(watcher.join)
        self._cleanup.callback(ended.set)

    def _open(self, primary: Daemon, export: UnixExport, content: Content) -> tuple[float, float]:
        """Seconds from the operator's word to the first missing block read; ms of a fetch."""
        began = time.monotonic()
        primary.client.call("POST", "/v1/volumes/demo/restore", {"lost": "all"})
        with NbdClient(export, "demo") as client, content.image.open("rb") as image:
            probes = []
            for number in range(PROBES + 1):
                offset = content.size // (PROBES + 2) * number // BLOCK_BYTES * BLOCK_BYTES
                image.seek(offset)
                expected = image.read(BLOCK_BYTES)
                sent = time.monotonic()
                if client.read(offset, BLOCK_BYTES) != expected:
                    raise DualRestoreError(
                        f"expected the content from before the loss at byte {offset}, "
                        "found something else"
                    )
                probes.append(time.monotonic() - sent)
                if number == 0:
                    open_seconds = time.monotonic() - began
        return open_seconds, statistics.median(probes[1:]) * 1000

    def _start_workload(self, export: UnixExport, content: Content, place: Path) -> WorkloadProcess:
        workload = WorkloadProcess(
            WorkloadOptions(
                socket=str(export.path),
                export="demo",
                image=str(content.image),
                area_offset=content.filesystem_bytes,
                area_bytes=content.size - content.filesystem_bytes,
                write_bytes_per_second=self.options.link_rate * WRITE_SHARE,
                seed=self.options.seed,
                shadow=str(place / "shadow.npy"),
            )
        )
        self._cleanup.callback(workload.kill)
        self._workload = workload
        return workload

    def _pass_time(self, seconds: float) -> None:
        assert self._workload is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            if self._workload.failure:
                raise DualRestoreError(f"the workload failed: {self._workload.failure}")

    def _bulk(self, primary: Daemon, backup: Daemon, place: Path) -> MergeReport:
        truck = place / "truck.drb"
        with self._stage("snapshot"):
            cut = primary.client.call("POST", "/v1/volumes/demo/snapshot", {"label": "demo"})
        with self._stage("bundle"):
            body = {"snapshot": cut["snapshot"], "media": [str(truck)]}
            backup.client.job("/v1/volumes/demo/bundle", body, self._progress)
            backup.client.call("DELETE", f"/v1/volumes/demo/snapshots/{cut['snapshot']}")
        with self._stage("merge"):
            told = primary.client.job(
                "/v1/volumes/demo/merge", {"sources": [str(truck)]}, self._progress
            )
        return read(MergeReport, told)

    def _compare(self, place: Path, content: Content) -> tuple[int, int]:
        """Lost writes, and blocks that differ between the sides or from before the loss."""
        with (place / "shadow.npy").open("rb") as file:
            shadow = numpy.load(file)
        lost, different = Findings(), 0
        with contextlib.ExitStack() as stack:
            one, two, image = (
                stack.enter_context(path.open("rb"))
                for path in (place / "primary.img", place / "mirror.img", content.image)
            )
            for at in range(0, content.size, COMPARE_BYTES):
                parts = [file.read(COMPARE_BYTES) for file in (one, two, image)]
                different += _different_blocks(parts[0], parts[1])
                boundary = max(0, min(COMPARE_BYTES, content.filesystem_bytes - at))
                different += _different_blocks(parts[0][:boundary], parts[2][:boundary])
                first = (max(at, content.filesystem_bytes)) // SECTOR_BYTES
                start = first - content.filesystem_bytes // SECTOR_BYTES
                for part in parts[:2]:
                    stamped = part[boundary:]
                    expected = shadow[start : start + len(stamped) // SECTOR_BYTES]
                    lost.add(examine(stamped, first, expected))
        return lost.stale + lost.wrong, different


def _problems(
    final: dict[str, Any],
    verified: VerifyReport,
    merged: MergeReport,
    missing_bytes: int,
    filesystem_clean: bool | None,
) -> list[str]:
    """What speaks against the proof, beyond the counts of writes and blocks."""
    found = {
        "verify found differences": not verified.same or bool(verified.unsettled),
        "damaged chunks": bool(merged.chunks_damaged or merged.chunks_repaired),
        "blocks still missing": bool(missing_bytes),
        "e2fsck found the filesystem damaged": filesystem_clean is False,
    }
    return [*final["errors"], *(words for words, is_so in found.items() if is_so)]


def _different_blocks(one: bytes, two: bytes) -> int:
    if one == two:
        return 0
    rows = (
        numpy.frombuffer(part, numpy.uint64).reshape(-1, BLOCK_BYTES // 8) for part in (one, two)
    )
    first, second = rows
    return int((first != second).any(axis=1).sum())
