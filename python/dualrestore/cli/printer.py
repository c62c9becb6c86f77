"""The only place that prints.

| what | for people | with --json |
|---|---|---|
| report | lines on standard output | one JSON document on standard output |
| progress | standard error, after a second | nothing |
| error | `error: TEXT` on standard error | one JSON document on standard error |

Where standard output is a bundle's (`--to -`) the report goes to standard error.

Guarantees: standard output holds the report and nothing else; rich is loaded for a terminal only.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from dualrestore.sizes import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_SECONDS = 1.0
"""Shorter work shows no progress."""
LINE_SECONDS = 10.0
"""How often progress is told where no terminal is."""

Counters = dict[str, int]


class Printer:
    """Prints for people, or for machines."""

    def __init__(self, *, as_json: bool, output_taken: bool = False) -> None:
        """`output_taken`: standard output carries something else; reports go to standard error."""
        self.as_json = as_json
        self._output_taken = output_taken

    def report(self, document: object, lines: Iterable[str]) -> None:
        """The result of a verb."""
        if self.as_json:
            click.echo(json.dumps(document), err=self._output_taken)
        else:
            for line in lines:
                click.echo(line, err=self._output_taken)

    def text(self, text: str) -> None:
        """Output that is the same for everybody: a script, a file."""
        click.echo(text, nl=False)

    def note(self, text: str) -> None:
        """A remark beside the result."""
        if not self.as_json:
            click.echo(text, err=True)

    def error(self, kind: str, text: str, code: int) -> None:
        """What went wrong."""
        if self.as_json:
            document = {"error": {"kind": kind, "message": text, "exit_code": int(code)}}
            click.echo(json.dumps(document), err=True)
        else:
            click.echo(f"error: {text}", err=True)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[Counters], None]]:
        """Something to give counters to while work goes on."""
        if self.as_json:
            yield lambda _: None
            return
        view = _TerminalProgress(label) if sys.stderr.isatty() else _LineProgress(label)
        try:
            yield view.update
        finally:
            view.close()


class _LineProgress:
    """A line now and then."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._began = time.monotonic()
        self._next = self._began + LINE_SECONDS

    def update(self, counters: Counters) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LINE_SECONDS
        done, total = counters.get("done_bytes", 0), counters.get("total_bytes", 0)
        percent = f" ({100 * done / total:.0f} %)" if total else ""
        rate = format_size(round(done / (now - self._began)))
        click.echo(f"{self._label}: {format_size(done)}{percent}, {rate}/s", err=True)

    def close(self) -> None:
        pass


class _TerminalProgress:
    """A bar that is drawn again and again."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._began = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def _open(self) -> "tuple[Progress, TaskID]":
        if self._bar is None or self._task is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._label, total=None)
            self._bar.start()
        return self._bar, self._task

    def update(self, counters: Counters) -> None:
        if self._bar is None and time.monotonic() - self._began < QUIET_SECONDS:
            return
        bar, task = self._open()
        total = counters.get("total_bytes")
        bar.update(task, completed=counters.get("done_bytes", 0), total=total or None)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names and values in two columns."""
    held = list(rows)
    width = max((len(name) for name, _ in held), default=0)
    return [f"{name:<{width}}  {value}" for name, value in held]


def size_and_share(part: int, whole: int) -> str:
    """For example `12 MiB (3.2 %)`."""
    return f"{format_size(part)} ({100 * part / whole:.1f} %)" if whole else format_size(part)


def speed(count: int, seconds: float) -> str:
    """For example `1.2 GiB in 3.1 s (396 MiB/s)`."""
    rate = f" ({format_size(round(count / seconds))}/s)" if seconds > 0 else ""
    return f"{format_size(count)} in {format_duration(seconds)}{rate}"


def as_document(value: Any) -> Any:
    """The plain document of a record, an extent, or a list of them."""
    import msgspec

    return msgspec.to_builtins(value)
