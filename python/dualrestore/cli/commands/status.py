"""`dualrestore status`: what a daemon holds, once or live."""

import sys
import time
from typing import TYPE_CHECKING

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option

if TYPE_CHECKING:
    from dualrestore.model import BackupStatus, NodeStatus, PrimaryStatus
    from dualrestore.transport.control_client import DaemonClient

INTERVAL_SECONDS = 1.0


@click.command("status")
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="Draw it live until Ctrl-C.")
@config_option
@json_option
@click.pass_obj
def command(invocation: Invocation, name: str | None, watch: bool) -> None:
    """Show volumes, maps, channels and jobs of the daemon, or one volume NAME.

    \b
    Example:
      dualrestore -c primary.toml status
      dualrestore -c primary.toml status --watch
    """
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer

    client = daemon_of(invocation)
    if watch:
        _watch(client, name, as_json=invocation.as_json)
        return
    status = _ask(client, name)
    Printer(as_json=invocation.as_json).report(status.document(), describe(status, None))


def _ask(client: "DaemonClient", name: str | None) -> "NodeStatus":
    from dualrestore.errors import UsageError
    from dualrestore.model import NodeStatus, read

    document = client.call("GET", "/v1/status")
    if name is not None:
        named = [volume for volume in document["volumes"] if volume["name"] == name]
        if not named:
            known = ", ".join(volume["name"] for volume in document["volumes"]) or "none"
            raise UsageError(f"expected a volume of the daemon ({known}), found {name!r}")
        document["volumes"] = named
    return read(NodeStatus, document)


def _watch(client: "DaemonClient", name: str | None, *, as_json: bool) -> None:
    from dualrestore.cli.printer import Printer

    printer = Printer(as_json=as_json)
    before: tuple[float, NodeStatus] | None = None
    if as_json or not sys.stdout.isatty():
        while True:
            status = _ask(client, name)
            printer.report(status.document(), [*describe(status, before), ""])
            before = (time.monotonic(), status)
            time.sleep(INTERVAL_SECONDS)
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4, screen=False) as live:
        while True:
            status = _ask(client, name)
            live.update(Text("\n".join(describe(status, before))))
            before = (time.monotonic(), status)
            time.sleep(INTERVAL_SECONDS)


def describe(status: "NodeStatus", before: "tuple[float, NodeStatus] | None") -> list[str]:
    """Lines for people. `before` gives the rate at which blocks come, and so the time left."""
    from dualrestore.model import PrimaryStatus
    from dualrestore.sizes import format_duration, format_size

    lines = []
    for volume in status.typed_volumes():
        if isinstance(volume, PrimaryStatus):
            lines += _primary_lines(volume, before)
        else:
            lines += _backup_lines(volume)
    running = [job for job in status.jobs if job.state == "running"]
    for job in running:
        done, total = job.progress.get("done_bytes", 0), job.progress.get("total_bytes", 0)
        share = f" {100 * done / total:.0f} %" if total else ""
        lines.append(
            f"job {job.job}: {job.verb} {job.volume}{share}, {format_duration(job.seconds)}"
        )
    lines.append(
        f"up {format_duration(status.seconds_up)}; links sent "
        f"{format_size(status.link_bytes_sent)}, received "
        f"{format_size(status.link_bytes_received)}"
    )
    return lines


def _primary_lines(volume: "PrimaryStatus", before: "tuple[float, NodeStatus] | None") -> list[str]:
    from dualrestore.cli.printer import size_and_share
    from dualrestore.sizes import format_size

    lines = [
        f"{volume.name} (primary, {format_size(volume.size)}): {volume.state}, "
        f"generation {volume.generation}"
    ]
    if volume.state == "waiting":
        lines.append(
            f"  waits for your word: restore {volume.name} --lost none (this disk is the truth) "
            "or --lost all (the backup is)"
        )
    if volume.error:
        lines.append(f"  ERROR: {volume.error}")
    lines.append(
        f"  current {size_and_share(volume.current_bytes, volume.size)}, missing "
        f"{format_size(volume.missing_bytes)}, unsent {format_size(volume.unsent_bytes)}"
        f"{_time_left(volume, before)}"
    )
    lines.append(
        f"  live: written {format_size(volume.bytes_written_live)}, fetched "
        f"{format_size(volume.bytes_fetched)}; bulk: merged {format_size(volume.bytes_merged)}, "
        f"skipped {format_size(volume.bytes_skipped_current)}, "
        f"by wire {format_size(volume.bytes_hydrated)}"
    )
    for medium in volume.media:
        shown = "attached" if medium.state == "attached" else medium.state.upper()
        error = f": {medium.error}" if medium.error else ""
        again = "; attach it again when it is back" if medium.state == "gone" else ""
        lines.append(
            f"  medium {medium.path}: {shown}, supplied {format_size(medium.bytes_supplied)} of "
            f"{format_size(medium.bytes_covered)}{error}{again}"
        )
    for backup in volume.backups:
        connected = "connected" if backup.connected else "NOT CONNECTED"
        error = f": {backup.error}" if backup.error else ""
        resync = ", resyncing" if backup.resyncing else ""
        lag = f", lags {format_size(backup.lag_bytes)}" if backup.lag_bytes else ""
        lines.append(
            f"  backup {backup.address}: {connected}{resync}, unsent "
            f"{format_size(backup.unsent_bytes)}{lag}{error}"
        )
    return lines


def _time_left(volume: "PrimaryStatus", before: "tuple[float, NodeStatus] | None") -> str:
    from dualrestore.sizes import format_duration

    if before is None or not volume.missing_bytes:
        return ""
    when, status = before
    for document in status.volumes:
        if document["name"] != volume.name:
            continue
        gained = document.get("missing_bytes", 0) - volume.missing_bytes
        rate = gained / max(time.monotonic() - when, 0.001)
        if rate <= 0:
            return ", not getting less"
        return f", about {format_duration(volume.missing_bytes / rate)} left"
    return ""


def _backup_lines(volume: "BackupStatus") -> list[str]:
    from dualrestore.cli.commands.snapshot import given_back
    from dualrestore.sizes import format_size

    connected = "connected" if volume.connected else "no primary connected"
    lines = [
        f"{volume.name} (backup, {format_size(volume.size)}): {volume.state}, "
        f"generation {volume.generation}, {connected}"
    ]
    if volume.error:
        lines.append(f"  ERROR: {volume.error}")
    lines.append(
        f"  mirrored {format_size(volume.bytes_mirrored)}, sent {format_size(volume.bytes_sent)}, "
        f"preserved {format_size(volume.bytes_preserved)}"
    )
    lines += [f"  WARNING: {words}" for words in volume.warnings]
    for snapshot in volume.snapshots:
        broken = f", BROKEN: {snapshot.broken}" if snapshot.broken else ""
        label = f" {snapshot.label}" if snapshot.label else ""
        broken += given_back(snapshot)
        lines.append(
            f"  snapshot {volume.name}@{snapshot.snapshot}{label}: preserved "
            f"{format_size(snapshot.preserved_bytes)}{broken}"
        )
    return lines
