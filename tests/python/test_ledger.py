"""Long verbs as jobs."""

import threading
from collections.abc import Callable

import pytest

from dualrestore.errors import BusyError, InterruptedJobError, error_document
from dualrestore.model import Record, RestoreReport
from dualrestore.servers.ledger import KEPT, RUNNING_MAX, Job, Ledger

REPORT = RestoreReport(generation=1, missing_bytes=0)
SECONDS = 20.0
Report = Callable[[dict[str, int]], None]


def finished(job: Job) -> Job:
    ended = threading.Event()
    job.watch(lambda: ended.set() if job.state != "running" else None)
    assert ended.wait(SECONDS)
    return job


def test_a_job_that_returns_is_done_with_its_report() -> None:
    job = finished(Ledger().start("merge", "v", lambda _: REPORT))
    assert (job.state, job.report, job.error) == ("done", REPORT, None)


def test_a_job_that_raises_has_failed_with_words() -> None:
    def work(_: Report) -> Record:
        raise BusyError("in use")

    job = finished(Ledger().start("merge", "v", work))
    assert (job.state, job.error) == ("failed", {"kind": "BusyError", "message": "in use"})


def test_a_cancelled_job_ends_at_its_next_progress() -> None:
    began, go_on = threading.Event(), threading.Event()

    def work(report: Report) -> Record:
        began.set()
        assert go_on.wait(SECONDS)
        report({"done_bytes": 1})
        return REPORT

    job = Ledger().start("merge", "v", work)
    assert began.wait(SECONDS)
    job.cancel()
    go_on.set()
    assert finished(job).state == "failed"
    assert job.error is not None
    assert job.error["kind"] == InterruptedJobError.__name__


def test_the_latest_progress_is_seen_while_it_runs() -> None:
    told, go_on = threading.Event(), threading.Event()

    def work(report: Report) -> Record:
        report({"done_bytes": 1, "total_bytes": 2})
        told.set()
        assert go_on.wait(SECONDS)
        return REPORT

    ledger = Ledger()
    job = ledger.start("verify", "v", work)
    assert told.wait(SECONDS)
    [status] = ledger.statuses()
    assert (status.state, status.progress["done_bytes"]) == ("running", 1)
    go_on.set()
    finished(job)


def test_only_so_many_run_at_a_time_and_so_many_are_remembered() -> None:
    go_on = threading.Event()

    def wait(_: Report) -> Record:
        assert go_on.wait(SECONDS)
        return REPORT

    ledger = Ledger()
    running = [ledger.start("merge", "v", wait) for _ in range(RUNNING_MAX)]
    with pytest.raises(BusyError):
        ledger.start("merge", "v", wait)
    go_on.set()
    for job in running:
        finished(job)
    ledger.stop(SECONDS)
    for _ in range(KEPT + 5):
        finished(ledger.start("merge", "v", lambda _: REPORT))
        ledger.stop(SECONDS)
    assert len(ledger.statuses()) == KEPT


def test_an_unexpected_error_is_told_without_its_traceback() -> None:
    told = error_document(ZeroDivisionError("division"))
    assert told["kind"] == "DualRestoreError"
    assert "ZeroDivisionError" in told["message"]
