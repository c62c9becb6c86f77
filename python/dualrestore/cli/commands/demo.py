"""`dualrestore demo`: the whole method on this machine, verified."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dualrestore.cli.arguments import DURATION, RATE, SIZE, Invocation, json_option

if TYPE_CHECKING:
    from dualrestore.jobs.demo.run import DemoReport, Scene

_WORDS = {
    "content": "making a filesystem of real files",
    "mirror": "writing it through the primary, mirrored to the backup (link not yet thin)",
    "loss": "stopping the primary and overwriting its disk with garbage",
    "open": "declaring the loss and reading the first blocks over the thin link",
    "live": "open for business: a verifying workload reads and writes",
    "snapshot": "cutting a snapshot at the backup",
    "bundle": "writing the bundle; the workload goes on",
    "merge": "the truck arrived: merging under the workload",
    "drain": "ending the workload, draining queues, comparing digests",
    "proof": "comparing both disks byte for byte",
}


@click.command("demo")
@click.option("--size", type=SIZE, default="1GiB", show_default=True, help="Of the volume.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Where to work (4 times the size)."
)
@click.option("--link-rate", type=RATE, default="200Mbit", show_default=True)
@click.option("--link-delay", type=DURATION, default="20ms", show_default=True, help="Each way.")
@click.option("--keep", is_flag=True, help="Keep the working directory.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the workload.")
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    size: int,
    directory: Path | None,
    link_rate: float,
    link_delay: float,
    keep: bool,
    seed: int,
) -> int:
    """Mirror a volume, destroy the primary's disk, open for business, merge a bundle, prove it.

    Backup and primary run as daemons of their own on this machine, over a link with a rate and a
    delay. Exit code 0 only if nothing was lost, stale or different.

    \b
    Example:
      dualrestore demo --size 1GiB --link-rate 200Mbit --link-delay 20ms
    """
    from dualrestore.cli.printer import Printer
    from dualrestore.errors import ExitCode
    from dualrestore.jobs.demo.run import Demo, DemoOptions

    options = DemoOptions(
        size=size,
        directory=directory.absolute() if directory else None,
        link_rate=link_rate,
        link_delay=link_delay,
        keep=keep,
        seed=seed,
    )
    with _view(as_json=invocation.as_json) as observe:
        report = Demo(options, observe).run()
    Printer(as_json=invocation.as_json).report(report.document(), _lines(report))
    return ExitCode.DONE if report.proven else ExitCode.DIFFERENCES


@contextlib.contextmanager
def _view(*, as_json: bool) -> Iterator[Callable[["Scene"], None]]:
    if as_json:
        yield lambda _: None
        return
    if not sys.stderr.isatty():
        yield _StageLines().update
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), refresh_per_second=8, transient=True) as live:
        yield lambda scene: live.update(
            Text("\n".join(_scene_lines(scene)), no_wrap=True, overflow="ellipsis")
        )


class _StageLines:
    """A line for each stage, where no terminal is."""

    def __init__(self) -> None:
        self._stage = ""

    def update(self, scene: "Scene") -> None:
        if scene.stage != self._stage:
            self._stage = scene.stage
            click.echo(f"{scene.stage}: {_WORDS[scene.stage]}", err=True)


def _bar(part: int, whole: int, width: int = 40) -> str:
    filled = width * part // whole if whole else 0
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def _scene_lines(scene: "Scene") -> list[str]:
    from dualrestore.sizes import format_size

    stages = list(_WORDS)
    number = stages.index(scene.stage) + 1
    lines = [f"{number}/{len(stages)} {_WORDS[scene.stage]}"]
    done, total = scene.progress.get("done_bytes", 0), scene.progress.get("total_bytes", 0)
    if total:
        lines.append(f"  {scene.stage:<9}{_bar(done, total)} {format_size(done)}")
    if scene.primary:
        current, size = scene.primary["current_bytes"], scene.primary["size"]
        lines.append(f"  {'current':<9}{_bar(current, size)} {format_size(current)}")
        lines.append(
            f"  live: {format_size(scene.primary['bytes_fetched'])} fetched, "
            f"{format_size(scene.primary['bytes_written_live'])} written"
        )
        lines.append(
            f"  bulk: {format_size(scene.primary['bytes_merged'])} merged; "
            f"the link carried {format_size(scene.link_bytes)}"
        )
    if scene.workload:
        lines.append(
            f"  workload: {scene.workload['reads']} reads verified, "
            f"{scene.workload['acknowledged_writes']} writes acknowledged, "
            f"{scene.workload['stale_reads'] + scene.workload['wrong_reads']} wrong"
        )
    return lines


def _lines(report: "DemoReport") -> list[str]:
    from dualrestore.cli.printer import table
    from dualrestore.sizes import format_duration, format_size

    rows = [
        (
            "volume",
            f"{format_size(report.volume_bytes)}, {report.filesystem}, {report.files} files",
        ),
        ("open for business after", format_duration(report.open_seconds)),
        (
            "a fetch",
            f"{report.fetch_ms_median:.1f} ms at the median, the link's round trip is "
            f"{report.link_round_trip_ms:.0f} ms",
        ),
        (
            "workload",
            f"{report.reads} reads verified, {report.acknowledged_writes} writes acknowledged",
        ),
        ("lost writes", str(report.lost_writes)),
        ("stale or wrong reads", str(report.stale_reads + report.wrong_reads)),
        ("different blocks", str(report.mismatched_blocks)),
        (
            "live channel",
            f"{format_size(report.bytes_fetched)} fetched, "
            f"{format_size(report.bytes_written_live)} written",
        ),
        (
            "bulk channel",
            f"{format_size(report.bytes_merged)} merged, "
            f"{format_size(report.bytes_skipped_current)} left because they were current",
        ),
        ("link carried", format_size(report.link_bytes)),
        (
            "memory at most",
            f"primary {format_size(report.primary_rss_bytes)}, "
            f"backup {format_size(report.backup_rss_bytes)}",
        ),
        ("seconds", ", ".join(f"{name} {took:.1f}" for name, took in report.seconds.items())),
        ("in all", format_duration(report.seconds_total)),
    ]
    lines = table(rows)
    lines += [f"problem: {problem}" for problem in report.problems]
    if report.directory:
        lines.append(f"kept: {report.directory}")
    lines.append(
        "PROVEN: every acknowledged write is there and both sides are byte-identical"
        if report.proven
        else "NOT PROVEN"
    )
    return lines
