"""`dualrestore merge`: bundles into a live volume, or offline into a file with a map."""

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualrestore.cli.arguments import (
    Invocation,
    config_option,
    json_option,
    node_certificates,
    source_place,
)
from dualrestore.cli.secrets import opening_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from dualrestore.cli.printer import Printer
    from dualrestore.core import Trust
    from dualrestore.jobs.merge import Source
    from dualrestore.keys import Opener
    from dualrestore.model import MergeReport, SourceReport

    Progress = Callable[[dict[str, int]], None]


@click.command("merge")
@click.argument("words", nargs=-1, required=True, metavar="BUNDLE.. NAME_or_DEVICE")
@click.option("--map", "map_path", type=click.Path(path_type=Path), metavar="MAP")
@click.option(
    "--engine",
    type=click.Choice(["auto", "io_uring", "threads"]),
    default="auto",
    show_default=True,
    help="Who reads and writes, offline.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, offline; read no chunk.")
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep what is overwritten, offline: in FILE and FILE.map.",
)
@click.option(
    "--revert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Put back what merges with --undo FILE overwrote, and lose what was written there since.",
)
@opening_options
@config_option
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    words: tuple[str, ...],
    map_path: Path | None,
    *,
    engine: str,
    dry_run: bool,
    undo: Path | None,
    revert: Path | None,
    identity: Path | None,
    passphrase_file: Path | None,
    signers: Path | None,
) -> int:
    """Write what is missing, and only that, from bundles (or a raw image) into a target.

    A BUNDLE is a directory, a tar (a file, a disk, or - for standard input), a raw image, or an
    export of an NBD server, such as NAME@SNAPSHOT of a backup. Several are merged at once, those on
    different disks side by side; if one fails the others go on. With --map the target is a file or
    device that nobody serves; without it, a volume of the daemon, under its live I/O. May be
    interrupted and repeated.

    \b
    Example:
      dualrestore merge out.drb primary.img --map over.map
      dualrestore merge /media/a/db /media/b/db /media/c/db primary.img --map over.map
      dualrestore merge out.drb primary.img --map over.map --identity key.txt
      ssh backup cat db.tar | dualrestore merge - primary.img --map over.map
      dualrestore merge "nbds://backup/db@7f3a?tls-certificates=/etc/pki" disk.img --map over.map
      dualrestore merge out.drb primary.img --map over.map --undo kept
      dualrestore merge --revert kept primary.img --map over.map
      dualrestore -c primary.toml merge /media/truck/db.drb db
      ssh backup cat db.tar | dualrestore -c primary.toml merge - db
      dualrestore -c primary.toml merge "nbd+unix:///db@7f3a?socket=/run/backup.sock" db
    """
    from dualrestore.cli.printer import Printer
    from dualrestore.cli.secrets import opener_of
    from dualrestore.errors import UsageError
    from dualrestore.jobs.merge import is_local

    if revert is not None:
        return _revert(invocation, revert, words, map_path)
    if map_path is None and (dry_run or undo is not None or engine != "auto"):
        raise UsageError("expected --map with --dry-run, --undo or --engine, found none")
    if len(words) == 1:
        raise UsageError(f"expected BUNDLE.. and then a target, found only {words[0]!r}")
    *sources, target = words
    opener = opener_of(identity, passphrase_file)
    places, trusts = _sources(sources, opener, signers)
    printer = Printer(as_json=invocation.as_json)
    with printer.progress("merge") as progress, _told(printer, target):
        if map_path is not None:
            from dualrestore.jobs.merge import OfflineOptions, merge_offline

            how = OfflineOptions(engine, undo, dry_run)
            tls = None if all(map(is_local, places)) else node_certificates(invocation)
            report = merge_offline(
                places, Path(target), map_path, progress, trusts=trusts, options=how, tls=tls
            )
        else:
            report = _merge_live(invocation, target, places, (trusts, opener), progress)
    lines, document = _lines(target, report), report.document()
    if dry_run:
        lines.insert(0, "dry run, nothing was written; this is what would be:")
        document["dry_run"] = True
    printer.report(document, lines)
    return _ended(printer, report)


def _sources(
    words: "Sequence[str]", opener: "Opener | None", signers: Path | None
) -> "tuple[list[Source], list[Trust | None]]":
    """What the words mean, and what each is held to."""
    from dualrestore.core import trusts_of
    from dualrestore.errors import UsageError
    from dualrestore.jobs.merge import check_sources, is_local

    if words.count("-") > 1:
        raise UsageError("expected - once, for there is one standard input, found it several times")
    places = [source_place(word) for word in words]
    if opener is None and signers is None:
        return places, [None] * len(places)
    check_sources(places)
    bundles = [place for place in places if is_local(place)]
    if len(bundles) < len(places):
        raise UsageError(
            "expected bundles with --identity, --passphrase-file or --signers, found an export of "
            "an NBD server, which is neither encrypted nor signed: merge it by itself"
        )
    return places, trusts_of(bundles, opener, signers)


@contextmanager
def _told(printer: "Printer", target: str) -> "Iterator[None]":
    """Where some of several sources failed, what the others did is told before the error is."""
    from dualrestore.errors import DualRestoreError
    from dualrestore.model import MergeReport, read

    try:
        yield
    except DualRestoreError as problem:
        if problem.report is not None:
            report = read(MergeReport, problem.report)
            printer.report(report.document(), _lines(target, report))
        raise


def _merge_live(
    invocation: Invocation,
    target: str,
    places: "Sequence[Source]",
    held_to: "tuple[Sequence[Trust | None], Opener | None]",
    progress: "Progress",
) -> "MergeReport":
    """By the daemon, which is handed standard input if that is a source."""
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.secrets import trust_documents
    from dualrestore.errors import UsageError
    from dualrestore.model import MergeReport, read
    from dualrestore.transport.handing import Handing

    if "/" in target:
        raise UsageError(
            f"expected --map MAP to merge into the file or device {target}, or the name of a "
            "volume of the daemon"
        )
    client = daemon_of(invocation)
    trusts, opener = held_to
    unwrap = None if opener is None else partial(opener.unwrap, place="the stream's key.age")
    with ExitStack() as handed:
        sources: list[Any] = []
        for place in places:
            if isinstance(place, int):
                handing = handed.enter_context(Handing(client.control, place, unwrap))
                sources.append({"stream": handing.token})
            else:
                sources.append(str(place.absolute() if isinstance(place, Path) else place))
        body: dict[str, Any] = {"sources": sources}
        if any(trusts):
            body["trusts"] = trust_documents(trusts)
        return read(MergeReport, client.job(f"/v1/volumes/{target}/merge", body, progress))


def _ended(printer: "Printer", report: "MergeReport") -> int:
    from dualrestore.errors import ExitCode

    if report.shortfall is not None:
        printer.error("IntegrityError", report.shortfall, ExitCode.FAILED)
        return ExitCode.FAILED
    incomplete = report.chunks_repaired or report.chunks_damaged or report.bytes_in_doubt
    return ExitCode.DAMAGED_CHUNKS if incomplete else ExitCode.DONE


def _revert(
    invocation: Invocation, kept: Path, words: tuple[str, ...], map_path: Path | None
) -> int:
    from dualrestore.cli.printer import Printer
    from dualrestore.errors import ExitCode, UsageError
    from dualrestore.jobs.merge import revert
    from dualrestore.sizes import format_size

    if map_path is None or len(words) != 1:
        raise UsageError("expected merge --revert FILE TARGET --map MAP, with nothing to merge")
    put_back = revert(kept, Path(words[0]), map_path)
    line = f"{words[0]}: put back {format_size(put_back)}, missing again"
    Printer(as_json=invocation.as_json).report({"bytes_put_back": put_back}, [line])
    return ExitCode.DONE


def _lines(target: str, report: "MergeReport") -> list[str]:
    """The report for people."""
    from dualrestore.cli.printer import speed
    from dualrestore.sizes import format_size

    lines = [
        f"{target}: wrote {speed(report.bytes_written, report.seconds)}, "
        f"{format_size(report.bytes_zeroed)} of it zeros; "
        f"left {format_size(report.bytes_skipped)} that were current"
    ]
    if report.chunks_repaired or report.chunks_damaged:
        lines.append(
            f"damaged on the medium: {report.chunks_repaired} chunks came another way (another "
            f"medium, the link), {report.chunks_damaged} left missing"
        )
    if len(report.sources) > 1:
        lines += [_source_line(one) for one in report.sources]
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
    if report.bytes_stale:
        lines.append(
            f"left {format_size(report.bytes_stale)} missing: they changed since the bundle was "
            "made, as the backup says; the link brings them"
        )
    return lines


def _source_line(one: "SourceReport") -> str:
    """What one of several sources did."""
    from dualrestore.sizes import format_size

    line = f"  {one.source}: wrote {format_size(one.bytes_written)}"
    if one.chunks_repaired or one.chunks_damaged:
        line += (
            f"; {one.chunks_repaired + one.chunks_damaged} chunks damaged, {one.chunks_damaged} of "
            "them left missing"
        )
    if one.shortfall is not None:
        line += f"; {one.shortfall}"
    if one.error is not None:
        line += f"; FAILED: {one.error['message']}"
    return line
