"""`dualrestore verify`: digests of both sides."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option

if TYPE_CHECKING:
    from dualrestore.model import VerifyReport


@click.command("verify")
@click.argument("name")
@click.argument("other", required=False)
@click.option("--repair", is_flag=True, help="Send the primary's content of what differs again.")
@config_option
@json_option
@click.pass_obj
def command(invocation: Invocation, name: str, other: str | None, repair: bool) -> int:
    """Compare the primary volume NAME with its backup, or two files that nobody serves.

    Exit code 4 if anything differs, 11 if something was written to at every try so that nothing
    can be said of it.

    \b
    Example:
      dualrestore -c primary.toml verify db
      dualrestore verify primary.img mirror.img
    """
    from dualrestore.cli.printer import Printer, speed
    from dualrestore.errors import ExitCode, UsageError
    from dualrestore.model import VerifyReport, read
    from dualrestore.sizes import format_range, format_size

    printer = Printer(as_json=invocation.as_json)
    with printer.progress("verify") as progress:
        if other is not None:
            from dualrestore.jobs.verify import verify_files

            if repair:
                raise UsageError("--repair: expected a volume of the daemon, found two files")
            report = verify_files(Path(name), Path(other), progress=progress)
        else:
            from dualrestore.cli.daemon import daemon_of

            client = daemon_of(invocation)
            body = {"repair": repair}
            report = read(VerifyReport, client.job(f"/v1/volumes/{name}/verify", body, progress))
    lines = [f"{name}: compared {speed(report.bytes_compared, report.seconds)}"]
    lines += [f"different: {format_range(*run)}" for run in report.different]
    lines += [f"unsettled (kept being written): {format_range(*run)}" for run in report.unsettled]
    if report.bytes_missing:
        lines.append(f"not compared, missing on the primary: {format_size(report.bytes_missing)}")
    if report.bytes_repaired:
        lines.append(f"being sent again: {format_size(report.bytes_repaired)}")
    lines.append(_verdict(report))
    printer.report({"same": report.same, **report.document()}, lines)
    if not report.same:
        return ExitCode.DIFFERENCES
    return ExitCode.BUSY if report.unsettled else ExitCode.DONE


def _verdict(report: "VerifyReport") -> str:
    from dualrestore.sizes import format_size

    if not report.same:
        return f"DIFFERENT: {format_size(report.bytes_different)}"
    return "NOT SETTLED: what was compared is the same" if report.unsettled else "same"
