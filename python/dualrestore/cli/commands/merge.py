"""`dualrestore merge`: bundles into a live volume, or offline into a file with a map."""

from pathlib import Path

import click

from dualrestore.cli.arguments import Invocation, config_option, input_place, json_option


@click.command("merge")
@click.argument("words", nargs=-1, required=True, metavar="BUNDLE.. NAME_or_DEVICE")
@click.option("--map", "map_path", type=click.Path(path_type=Path), metavar="MAP")
@config_option
@json_option
@click.pass_obj
def command(invocation: Invocation, words: tuple[str, ...], map_path: Path | None) -> int:
    """Write what is missing, and only that, from bundles (or a raw image) into a target.

    A BUNDLE is a directory, a tar (a file, a disk, or - for standard input), or a raw image.
    With --map the target is a file or device that nobody serves; without it, a volume of the
    daemon, under its live I/O. May be interrupted and repeated.

    \b
    Example:
      dualrestore merge out.drb primary.img --map over.map
      ssh backup cat db.tar | dualrestore merge - primary.img --map over.map
      dualrestore -c primary.toml merge /media/truck/db.drb db
    """
    from dualrestore.cli.printer import Printer, speed
    from dualrestore.errors import ExitCode, UsageError
    from dualrestore.model import MergeReport, read
    from dualrestore.sizes import format_size

    if len(words) == 1:
        raise UsageError(f"expected BUNDLE.. and then a target, found only {words[0]!r}")
    *sources, target = words
    printer = Printer(as_json=invocation.as_json)
    with printer.progress("merge") as progress:
        if map_path is not None:
            from dualrestore.jobs.merge import merge_offline

            places = [input_place(source) for source in sources]
            report = merge_offline(places, Path(target), map_path, progress)
        else:
            from dualrestore.cli.daemon import daemon_of

            if "/" in target:
                raise UsageError(
                    f"expected --map MAP to merge into the file or device {target}, or the name "
                    "of a volume of the daemon"
                )
            if "-" in sources:
                raise UsageError("expected paths to merge into a volume of the daemon, found -")
            body = {"sources": [str(Path(source).absolute()) for source in sources]}
            client = daemon_of(invocation)
            report = read(MergeReport, client.job(f"/v1/volumes/{target}/merge", body, progress))
    lines = [
        f"{target}: wrote {speed(report.bytes_written, report.seconds)}, "
        f"{format_size(report.bytes_zeroed)} of it zeros; "
        f"left {format_size(report.bytes_skipped)} that were current"
    ]
    if report.chunks_repaired or report.chunks_damaged:
        lines.append(
            f"damaged on the medium: {report.chunks_repaired} chunks repaired over the link, "
            f"{report.chunks_damaged} left missing"
        )
    if report.bytes_fetched:
        lines.append(
            f"fetched {format_size(report.bytes_fetched)} over the link: after a crash the medium "
            "may be too old for them"
        )
    if report.bytes_in_doubt:
        lines.append(
            f"left {format_size(report.bytes_in_doubt)} missing, which after a crash only the "
            "link may bring, and it is down; repeat the merge when it is up"
        )
    printer.report(report.document(), lines)
    if report.shortfall is not None:
        printer.error("IntegrityError", report.shortfall, ExitCode.FAILED)
        return ExitCode.FAILED
    incomplete = report.chunks_repaired or report.chunks_damaged or report.bytes_in_doubt
    return ExitCode.DAMAGED_CHUNKS if incomplete else ExitCode.DONE
