"""`dualrestore restore`: declare a loss and open for business."""

import sys
from typing import Any, Literal

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option


def parse_lost(words: tuple[str, ...]) -> list[tuple[int, int]] | Literal["all", "none"]:
    """`all`, `none`, or ranges."""
    from dualrestore.errors import UsageError
    from dualrestore.sizes import parse_range

    for word in ("all", "none"):
        if word in words:
            if len(words) > 1:
                raise UsageError(f"--lost: expected {word!r} alone, found {' '.join(words)!r}")
            return "all" if word == "all" else "none"
    return [parse_range(word) for word in words]


@click.command("restore")
@click.argument("name")
@click.option("--lost", "lost", multiple=True, required=True, metavar="all|none|RANGE..")
@click.argument("more", nargs=-1, metavar="")
@click.option("--wire", is_flag=True, help="Bring what is missing over the link too.")
@click.option("--yes", is_flag=True, help="Do not ask on a terminal.")
@config_option
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    name: str,
    lost: tuple[str, ...],
    more: tuple[str, ...],
    wire: bool,
    yes: bool,
) -> None:
    """Declare what the primary volume NAME has lost; it opens for business at once.

    `all`: the backup is the truth. `none`: the primary is. RANGE is START-END in bytes with
    suffixes, end exclusive. What is lost is never written to the backup.

    \b
    Example:
      dualrestore -c primary.toml restore db --lost all
      dualrestore -c primary.toml restore db --lost 0-1GiB 7GiB-8GiB --wire
    """
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer
    from dualrestore.model import RestoreReport, read
    from dualrestore.sizes import format_duration, format_size

    ranges = parse_lost((*lost, *more))
    if sys.stdin.isatty() and not yes and not invocation.as_json:
        what = ranges if isinstance(ranges, str) else f"{len(ranges)} ranges"
        click.confirm(f"Declare as lost on the primary {name}: {what}?", abort=True, err=True)
    body: dict[str, Any] = {"lost": ranges, "wire": wire}
    told = daemon_of(invocation).call("POST", f"/v1/volumes/{name}/restore", body)
    report = read(RestoreReport, told)
    Printer(as_json=invocation.as_json).report(
        {"name": name, **report.document()},
        [
            f"{name}: open for business after {format_duration(report.seconds)}, "
            f"generation {report.generation}, {format_size(report.missing_bytes)} missing"
        ],
    )
