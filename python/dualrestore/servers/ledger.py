"""Long verbs as jobs: each in a thread, watched and ended from elsewhere.

| state | event | next |
|---|---|---|
| running | the verb returned | done |
| running | the verb raised | failed |
| running | `cancel`, then the verb's next report of progress | failed (InterruptedJobError) |

Guarantees: a watcher sees the latest progress and always the end; the last `KEPT` jobs are
remembered; at most `RUNNING_MAX` run. Does not know: what the verbs do.
"""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from dualrestore.core import Progress
from dualrestore.errors import (
    BusyError,
    DualRestoreError,
    InterruptedJobError,
    error_document,
)
from dualrestore.model import JobStatus, Record

log = logging.getLogger("dualrestore.jobs")

KEPT = 50
RUNNING_MAX = 16

Work = Callable[[Progress], Record]


class Job:
    """One run of a verb."""

    def __init__(self, number: int, verb: str, volume: str) -> None:
        self.number = number
        self.verb = verb
        self.volume = volume
        self.state = "running"
        self.progress: dict[str, int] = {}
        self.report: Record | None = None
        self.error: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._seconds = 0.0
        self._cancelled = threading.Event()
        self._watchers: list[Callable[[], None]] = []

    def cancel(self) -> None:
        """Asks the job to end at its next safe point."""
        self._cancelled.set()

    def watch(self, watcher: Callable[[], None]) -> None:
        """Calls `watcher` from the job's thread whenever something changed. It must not block."""
        self._watchers.append(watcher)
        if self.state != "running":
            watcher()

    def _tell(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def _report_progress(self, counters: dict[str, int]) -> None:
        if self._cancelled.is_set():
            raise InterruptedJobError(
                f"{self.verb} {self.volume}: ended on request; ask again to go on with it"
            )
        self.progress = counters
        self._tell()

    def run(self, work: Work) -> None:
        """Does it, in the calling thread."""
        try:
            self.report = work(self._report_progress)
            self.state = "done"
        except DualRestoreError as problem:
            self.error, self.state = error_document(problem), "failed"
        except Exception as problem:
            log.exception("%s %s failed", self.verb, self.volume)
            self.error, self.state = error_document(problem), "failed"
        self._seconds = time.monotonic() - self._began
        self._tell()

    def status(self) -> JobStatus:
        """As it is now."""
        running = self.state == "running"
        return JobStatus(
            job=self.number,
            verb=self.verb,
            volume=self.volume,
            state=self.state,
            progress=self.progress,
            error=self.error["message"] if self.error else None,
            seconds=time.monotonic() - self._began if running else self._seconds,
        )


class Ledger:
    """All jobs of a daemon, the newest last."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._threads: dict[int, threading.Thread] = {}

    def start(self, verb: str, volume: str, work: Work) -> Job:
        """Begins a job in a thread of its own."""
        with self._lock:
            if len(self._threads) >= RUNNING_MAX:
                raise BusyError(
                    f"expected fewer than {RUNNING_MAX} running jobs, found that many; "
                    "wait for one to end"
                )
            job = Job(next(self._numbers), verb, volume)
            self._jobs[job.number] = job
            while len(self._jobs) > KEPT and self._jobs[next(iter(self._jobs))].state != "running":
                self._jobs.popitem(last=False)
            thread = threading.Thread(
                target=self._run, args=(job, work), name=f"job-{job.number}-{verb}", daemon=True
            )
            self._threads[job.number] = thread
        thread.start()
        return job

    def _run(self, job: Job, work: Work) -> None:
        try:
            job.run(work)
        finally:
            with self._lock:
                self._threads.pop(job.number, None)

    def statuses(self) -> list[JobStatus]:
        """The remembered jobs, oldest first."""
        with self._lock:
            jobs = list(self._jobs.values())
        return [job.status() for job in jobs]

    def stop(self, seconds: float) -> None:
        """Cancels what runs and waits for it."""
        with self._lock:
            threads = list(self._threads.items())
        for number, _ in threads:
            self._jobs[number].cancel()
        until = time.monotonic() + seconds
        for _, thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
