"""Makes a bundle for the command line, medium by medium, asking a person for the next one.

Does not know: how a bundle is written.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from dualrestore.cli.arguments import Invocation, node_certificates
from dualrestore.cli.printer import Printer, speed
from dualrestore.errors import DeviceError, ExitCode, UsageError
from dualrestore.jobs.bundle import BundleOptions
from dualrestore.model import BundleReport, read
from dualrestore.sizes import format_size
from dualrestore.transport.nbd_uri import is_nbd_uri, parse_nbd_uri

Progress = Callable[[dict[str, int]], None]
OUTPUT = "-"
"""Standard output."""


@dataclass(frozen=True)
class Making:
    """What is to be made, and the media at hand, as the words of a command."""

    source: str
    media: list[str]
    options: BundleOptions
    plain: bool


Medium = Path | int
"""A directory, file or disk, or the descriptor of standard output."""


def make(invocation: Invocation, making: Making) -> int:
    """Writes the bundle, or as much of it as there are media for; returns the exit code."""
    from dualrestore.cli.secrets import check_sign

    to_output = making.media == [OUTPUT]
    if OUTPUT in making.media and not to_output:
        raise UsageError(f"expected one --to {OUTPUT} alone, found others beside it")
    media: list[Medium] = (
        [sys.stdout.fileno()] if to_output else [Path(word).absolute() for word in making.media]
    )
    for medium in media:
        check_sign(making.options.sign, medium)
        _check_carried(medium, making)
    printer = Printer(as_json=invocation.as_json, output_taken=to_output)
    write = _writer_of(invocation, making, printer)
    used = list(media)
    report = write(media, making.options)
    options = replace(making.options, proceed=True)
    while not report.complete and (medium_path := _ask(report, invocation)) is not None:
        try:
            _check_carried(medium_path, making)
            report = write([medium_path], options)
            used.append(medium_path)
        except (UsageError, DeviceError) as problem:
            printer.note(f"medium {report.media + 1}: {problem}")
    _print(printer, making, used, report)
    return ExitCode.DONE if report.complete else ExitCode.NEXT_MEDIUM


def _check_carried(medium: Medium, making: Making) -> None:
    """A disk that is carried away may fall into other hands: plain only if that is said."""
    from dualrestore.core import disk_behind

    options = making.options
    if isinstance(medium, int) or options.encryption is not None:
        return
    if making.plain or options.proceed:
        return
    disk = disk_behind(medium)
    if disk is not None and disk.removable:
        raise UsageError(
            f"{medium}: expected --recipient, --passphrase-file or --plain for a disk that can be "
            f"carried away ({disk.model or disk.device}), found none of them"
        )


def _writer_of(
    invocation: Invocation, making: Making, printer: Printer
) -> Callable[[list[Medium], BundleOptions], BundleReport]:
    source = making.source
    export = parse_nbd_uri(source) if is_nbd_uri(source) else None
    if export is None and "@" in source and not Path(source).exists():
        from dualrestore.cli.daemon import daemon_of
        from dualrestore.cli.secrets import encryption_document
        from dualrestore.signatures import sign_finished

        name, _, snapshot = source.partition("@")
        if making.media == [OUTPUT]:
            raise UsageError("expected a directory or file of the daemon's host, found -")
        client = daemon_of(invocation)

        def write_there(media: list[Medium], options: BundleOptions) -> BundleReport:
            body = asdict(replace(options, encryption=None, sign=None))
            # A daemon keeps its records itself, its snapshots have their block size, and it has
            # no business with keys that sign.
            del body["state"], body["block_size"], body["sign"]
            body["release"] = options.release or "auto"
            body |= {
                "snapshot": snapshot,
                "media": [str(medium) for medium in media],
                "encryption": encryption_document(options.encryption),
            }
            with printer.progress("bundle") as progress:
                told = client.job(f"/v1/volumes/{name}/bundle", body, progress)
            if options.sign is not None:
                for medium in media:
                    if isinstance(medium, Path):
                        sign_finished(medium, options.sign)
            return read(BundleReport, told)

        return write_there

    if making.options.release is not None:
        raise UsageError(
            f"{source}: expected a snapshot (NAME@SNAPSHOT) that --release can give back, found an "
            "image; leave it out"
        )
    state = _state(printer, proceed=making.options.proceed)
    tls = None if export is None else node_certificates(invocation)

    def write_here(media: list[Medium], options: BundleOptions) -> BundleReport:
        from dualrestore.jobs.bundle import create_bundle

        with printer.progress("bundle") as progress:
            options = replace(options, state=state)
            return create_bundle(export or Path(source), media, options, progress, tls=tls)

    return write_here


def _state(printer: Printer, *, proceed: bool) -> Path | None:
    """Where this user's records of unfinished bundles are."""
    from dualrestore.config import state_home

    place = state_home() / "bundles"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as problem:
        if proceed:
            raise DeviceError(problem.errno or 5, f"{place}: {problem.strerror}") from problem
        printer.note(
            f"{place} cannot be made ({problem.strerror}): this bundle cannot be gone on with if "
            "it is stopped; XDG_STATE_HOME names another place"
        )
        return None
    return place


def _ask(report: BundleReport, invocation: Invocation) -> Path | None:
    """The next medium, if there is somebody to ask."""
    if invocation.as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    told = click.prompt(
        f"Medium {report.media} is written and may be taken away. "
        f"{format_size(report.bytes_left)} are left.\n"
        f"Directory on medium {report.media + 1} (nothing: stop here)",
        default="",
        show_default=False,
        err=True,
    )
    return Path(told).absolute() if told.strip() else None


def _print(printer: Printer, making: Making, used: list[Medium], report: BundleReport) -> None:
    paths = [OUTPUT if isinstance(medium, int) else str(medium) for medium in used]
    places = ", ".join(paths)
    next_medium = None if report.complete else report.media + 1
    lines = [
        f"{places}: {speed(report.bytes_selected - report.bytes_left, report.seconds)}, "
        f"{format_size(report.bytes_stored)} stored in {report.segments} segments, "
        f"{format_size(report.bytes_zero)} zeros"
        + (f", {format_size(report.bytes_saved)} saved" if report.bytes_saved else "")
        + (", encrypted" if report.encrypted else "")
    ]
    if report.media > 1:
        lines.append(f"{report.media} media")
    document = {
        "path": paths[0],
        "paths": paths,
        **report.document(),
        "complete": report.complete,
        "next_medium": next_medium,
    }
    printer.report(document, lines)
    if next_medium is not None:
        printer.error(
            "NextMediumError",
            f"{making.source}: medium {report.media} is written, "
            f"{format_size(report.bytes_left)} are left for medium {next_medium}: go on with "
            f"`dualrestore bundle create {making.source} --to DIR --continue`",
            ExitCode.NEXT_MEDIUM,
        )
