"""Compares digests of both sides, range by range, without crying wolf (law 10).

| a range is | then |
|---|---|
| same | done |
| busy (written, fetched, merged or resent meanwhile) | asked again later, up to `TRIES` times |
| different | asked once more: only what differs twice is a difference |
| busy at every try | reported as unsettled: nothing is said of it |
| not to be asked, the link being down | as busy; at the first and the last try the verify fails |

Does not know: how a digest travels.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dualrestore.errors import DeviceError, LinkError, UsageError
from dualrestore.model import VerifyReport
from dualrestore.sizes import format_size

if TYPE_CHECKING:
    from dualrestore.core import PrimaryVolume, Progress

RANGE_BYTES = 4 * 2**20
"""Of one comparison: small enough that a busy volume leaves some untouched meanwhile."""
IN_FLIGHT = 4
"""Comparisons on the way at a time, so that the link's delay is not paid for each."""
AHEAD = 4 * IN_FLIGHT
"""Asked and not yet counted: a volume of 16 TiB has four million ranges."""
TRIES = 12
PAUSE_FIRST, PAUSE_MOST = 0.05, 2.0
TIMEOUT_MS = 30_000
FILE_BYTES = 8 * 2**20


Run = tuple[int, int]
Answer = dict[str, object]


@dataclass
class _Findings:
    compared: int = 0
    missing: int = 0
    different: list[tuple[int, int]] = field(default_factory=list)
    unsettled: list[tuple[int, int]] = field(default_factory=list)


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(RANGE_BYTES, size - at)) for at in range(0, size, RANGE_BYTES))


def _settle(
    volume: "PrimaryVolume",
    backup: int,
    size: int,
    progress: "Progress | None",
) -> _Findings:
    findings = _Findings()
    suspected: set[tuple[int, int]] = set()
    pending: Iterable[Run] = _ranges(size)
    busy: list[Run] = []
    done = 0

    attempt = 0

    def ask(run: tuple[int, int]) -> tuple[tuple[int, int], dict[str, object]]:
        try:
            return run, volume.compare(*run, backup=backup, timeout_ms=TIMEOUT_MS)
        except LinkError:
            if attempt in {0, TRIES - 1}:
                raise
            return run, {"state": "busy"}

    with ThreadPoolExecutor(IN_FLIGHT, "verify") as pool:
        try:
            for attempt in range(TRIES):
                if attempt:
                    time.sleep(min(PAUSE_FIRST * 2**attempt, PAUSE_MOST))
                busy = []
                for run, answer in _in_order(pool, ask, pending):
                    if answer["state"] == "busy":
                        busy.append(run)
                        continue
                    if answer["state"] == "different" and run not in suspected:
                        suspected.add(run)
                        busy.append(run)
                        continue
                    done += run[1]
                    _count(findings, answer)
                    if progress is not None:
                        progress(
                            {
                                "done_bytes": done,
                                "total_bytes": size,
                                "different": len(findings.different),
                            }
                        )
                pending = busy
                if not busy:
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    findings.unsettled = busy
    return findings


def _in_order(
    pool: ThreadPoolExecutor, ask: Callable[[Run], tuple[Run, Answer]], runs: Iterable[Run]
) -> Iterator[tuple[Run, Answer]]:
    """What `ask` says of each; only some of them are asked ahead, however many there are."""
    asked: deque[Future[tuple[Run, Answer]]] = deque()
    for run in runs:
        asked.append(pool.submit(ask, run))
        if len(asked) >= AHEAD:
            yield asked.popleft().result()
    while asked:
        yield asked.popleft().result()


def _count(findings: _Findings, answer: dict[str, object]) -> None:
    compared, missing = answer["compared_bytes"], answer["missing_bytes"]
    different = answer["different"]
    assert isinstance(compared, int)
    assert isinstance(missing, int)
    assert isinstance(different, list)
    findings.compared += compared
    findings.missing += missing
    findings.different += [(offset, length) for offset, length in different]


def verify_volume(
    volume: "PrimaryVolume",
    *,
    backup: int = 0,
    repair: bool = False,
    progress: "Progress | None" = None,
) -> VerifyReport:
    """Compares what is current on the primary with the backup.

    `repair` sends the primary's content of what differs again: the primary is the truth for
    current blocks.
    """
    began = time.monotonic()
    findings = _settle(volume, backup, volume.status()["size"], progress)
    different = findings.different
    repaired = volume.repair(different, backup=backup) if repair and different else 0
    return VerifyReport(
        bytes_compared=findings.compared,
        bytes_missing=findings.missing,
        bytes_different=sum(length for _, length in different),
        different=different,
        unsettled=findings.unsettled,
        bytes_repaired=repaired,
        seconds=time.monotonic() - began,
    )


def verify_files(
    first: Path, second: Path, *, block_size: int = 4096, progress: "Progress | None" = None
) -> VerifyReport:
    """Compares two files or devices that nobody serves, block by block."""
    began = time.monotonic()
    different: list[tuple[int, int]] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in (first, second)]
        sizes = [file.seek(0, os.SEEK_END) for file in files]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"expected two files of the same size, found {format_size(sizes[0], exact=True)} "
                f"({first}) and {format_size(sizes[1], exact=True)} ({second})"
            )
        for file in files:
            file.seek(0)
        for offset in range(0, sizes[0], FILE_BYTES):
            one, two = (file.read(FILE_BYTES) for file in files)
            if one != two:
                _add_differences(different, offset, one, two, block_size)
            if progress is not None:
                progress(
                    {"done_bytes": min(offset + FILE_BYTES, sizes[0]), "total_bytes": sizes[0]}
                )
    return VerifyReport(
        bytes_compared=sizes[0],
        bytes_missing=0,
        bytes_different=sum(length for _, length in different),
        different=different,
        unsettled=[],
        bytes_repaired=0,
        seconds=time.monotonic() - began,
    )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as problem:
        raise DeviceError(
            problem.errno or 5, f"{path}: cannot read: {problem.strerror}"
        ) from problem


def _add_differences(
    different: list[tuple[int, int]], offset: int, one: bytes, two: bytes, block_size: int
) -> None:
    for at in range(0, len(one), block_size):
        length = min(block_size, len(one) - at)
        if one[at : at + length] == two[at : at + length]:
            continue
        if different and sum(different[-1]) == offset + at:
            different[-1] = (different[-1][0], different[-1][1] + length)
        else:
            different.append((offset + at, length))
