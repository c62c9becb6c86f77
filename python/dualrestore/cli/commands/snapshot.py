"""`dualrestore snapshot`: cut, list and delete snapshots."""

from typing import TYPE_CHECKING

import click

from dualrestore.cli.arguments import RANGE, Invocation, config_option, json_option

if TYPE_CHECKING:
    from dualrestore.model import SnapshotReport


def given_back(report: "SnapshotReport") -> str:
    """What only a bundle holds any more, in words."""
    from dualrestore.sizes import format_size

    if not report.released_bytes:
        return ""
    return f", {format_size(report.released_bytes)} given back to a bundle"


@click.command("snapshot")
@click.argument("name")
@click.option("--select", "select", multiple=True, type=RANGE, metavar="RANGE..")
@click.argument("more", nargs=-1, type=RANGE, metavar="")
@click.option("--label", default="", help="Words for people.")
@click.option("--list", "listed", is_flag=True, help="List the snapshots (at the backup).")
@click.option("--delete", "deleted", metavar="ID", help="Delete a snapshot (at the backup).")
@config_option
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    name: str,
    select: tuple[tuple[int, int], ...],
    more: tuple[tuple[int, int], ...],
    label: str,
    listed: bool,
    deleted: str | None,
) -> None:
    """Cut a snapshot of volume NAME at its backup, through the primary's daemon while it runs.

    \b
    Example:
      dualrestore -c primary.toml snapshot db --label monday
      dualrestore -c backup.toml snapshot db --list
    """
    from urllib.parse import quote

    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer, as_document
    from dualrestore.errors import UsageError
    from dualrestore.model import SnapshotReport, read
    from dualrestore.sizes import format_size

    printer = Printer(as_json=invocation.as_json)
    client = daemon_of(invocation)
    selection = [*select, *more]
    if (listed or deleted) and (selection or label or (listed and deleted)):
        raise UsageError("expected one of cutting, --list and --delete, found several")
    if listed:
        found = client.call("GET", f"/v1/volumes/{name}/snapshots")
        reports = [read(SnapshotReport, document) for document in found]
        lines = [
            f"{name}@{report.snapshot}  generation {report.generation}, sequence "
            f"{report.sequence}, preserved {format_size(report.preserved_bytes)}"
            f"{given_back(report)}{f', BROKEN: {report.broken}' if report.broken else ''}"
            f"  {report.label}".rstrip()
            for report in reports
        ]
        printer.report(as_document(reports), lines or ["no snapshots"])
        return
    if deleted:
        identity = deleted.removeprefix(f"{name}@")
        client.call("DELETE", f"/v1/volumes/{name}/snapshots/{quote(identity, safe='')}")
        printer.report({"deleted": identity}, [f"{name}@{identity} deleted"])
        return
    body = {"label": label, "selection": selection or None}
    report = read(SnapshotReport, client.call("POST", f"/v1/volumes/{name}/snapshot", body))
    printer.report(
        report.document(),
        [
            f"{name}@{report.snapshot}: generation {report.generation}, sequence {report.sequence}",
            f"next, at the backup: dualrestore bundle create {name}@{report.snapshot} --to DIR",
        ],
    )
