"""`dualrestore bundle`: create, verify, show, extract."""

from pathlib import Path
from typing import Any

import click

from dualrestore.cli.arguments import (
    COMPRESSION,
    RANGE,
    SIZE,
    Invocation,
    config_option,
    input_place,
    json_option,
)
from dualrestore.cli.secrets import locking_options, opening_options


@click.group("bundle")
def command() -> None:
    """Create, verify, show or extract a bundle: the snapshot copy in its shippable form.

    \b
    Example:
      dualrestore bundle create disk.img --to /media/truck/disk.drb
    """


@command.command("create")
@click.argument("source")
@click.option(
    "--to",
    "media",
    required=True,
    multiple=True,
    metavar="DIR|FILE.tar|DISK|-",
    help="A new directory; repeat it for several media, filled in this order. Or a tar: a new "
    "file, a disk, or - for standard output.",
)
@click.option("--select", "select", multiple=True, type=RANGE, metavar="RANGE")
@click.option(
    "--partition",
    "partitions",
    multiple=True,
    type=click.IntRange(1, 1023),
    metavar="N",
    help="A partition by its number (MBR or GPT).",
)
@click.option("--allocated", is_flag=True, help="Leave out holes of the source.")
@click.option(
    "--since",
    metavar="CUT",
    help="Only what changed since the cut of this snapshot, which may be deleted.",
)
@click.option(
    "--compress",
    type=COMPRESSION,
    default="none",
    show_default=True,
    metavar="auto|none|zstd[:N]",
    help="auto compresses what shrinks, while the sink does not wait for it.",
)
@click.option(
    "--medium-size",
    type=SIZE,
    metavar="SIZE",
    help="Bytes of all files on one medium; else as many as it takes.",
)
@click.option(
    "--continue",
    "proceed",
    is_flag=True,
    help="Go on with a bundle that was stopped, or that waits for its next medium.",
)
@click.option("--force", is_flag=True, help="Write a tar over a disk that is not removable.")
@click.option(
    "--release",
    type=click.Choice(["auto", "always", "never"]),
    help="When a snapshot gives back what is durable on a medium, so that only the bundle has it: "
    "auto (as usual), before it would break because its store is full.",
)
@locking_options
@config_option
@json_option
@click.pass_obj
def create(
    invocation: Invocation,
    source: str,
    media: tuple[str, ...],
    *,
    select: tuple[tuple[int, int], ...],
    partitions: tuple[int, ...],
    allocated: bool,
    since: str | None,
    compress: str,
    medium_size: int | None,
    proceed: bool,
    force: bool,
    release: str | None,
    recipients: tuple[str, ...],
    passphrase_file: Path | None,
    plain: bool,
    sign: Path | None,
) -> int:
    """Write a bundle of SOURCE: an image or device, an export of an NBD server, or NAME@SNAPSHOT at
    its backup's daemon.

    Each --to is one medium, and can be read without the others. When they are full the next one is
    asked for on a terminal; elsewhere the exit code is 6, and --continue goes on with another.

    \b
    Example:
      dualrestore bundle create disk.img --to disk.drb --compress auto
      dualrestore bundle create disk.img --to /media/truck/disk.drb --recipient age1..
      dualrestore bundle create disk.img --to - | ssh site dualrestore merge - disk.img --map m
      dualrestore -c backup.toml bundle create db@7f3a --to /media/truck/db.drb
      dualrestore bundle create "nbd+unix:///db@7f3a?socket=/run/b.sock" --to db.drb
      dualrestore bundle create disk.img --to /media/a/disk --to /media/b/disk
      dualrestore bundle create disk.img --to /media/c/disk --continue
      dualrestore bundle create disk.img --to disk.drb --partition 2 --allocated
      dualrestore -c backup.toml bundle create db@7f3a --to db2.drb --since 19c2
    """
    from dualrestore.cli.making import Making, make
    from dualrestore.cli.secrets import encryption_of
    from dualrestore.jobs.bundle import BundleOptions

    options = BundleOptions(
        list(select) or None,
        compress,
        medium_size=medium_size,
        partitions=partitions,
        allocated=allocated,
        since=since,
        proceed=proceed,
        encryption=encryption_of(recipients, passphrase_file, plain=plain),
        sign=sign,
        force=force,
        release=release,
    )
    return make(invocation, Making(source, list(media), options, plain))


@command.command("verify")
@click.argument("bundle")
@opening_options
@json_option
@click.pass_obj
def verify(
    invocation: Invocation,
    bundle: str,
    identity: Path | None,
    passphrase_file: Path | None,
    signers: Path | None,
) -> int:
    """Read and check every chunk of BUNDLE; exit code 4 if anything is damaged or absent.

    BUNDLE is a directory, a tar (file or disk), or - for a tar on standard input.

    \b
    Example:
      dualrestore bundle verify /media/truck/db.drb
      dualrestore bundle verify db.drb --identity key.txt --signers allowed_signers
      ssh site cat db.tar | dualrestore bundle verify -
    """
    from dualrestore.cli.printer import Printer, speed
    from dualrestore.cli.secrets import opener_of
    from dualrestore.errors import ExitCode
    from dualrestore.jobs.bundle import verify_bundle
    from dualrestore.sizes import format_range

    printer = Printer(as_json=invocation.as_json)
    with printer.progress("verify") as progress:
        opener = opener_of(identity, passphrase_file)
        found = verify_bundle(input_place(bundle), progress, opener=opener, signers=signers)
    lines = [
        f"{bundle}: {speed(found.bytes_checked, found.seconds)}, {found.chunks_checked} chunks"
    ]
    lines += [f"damaged: {format_range(*run)}" for run in found.damaged]
    lines += [f"problem: {problem}" for problem in found.problems]
    lines.append("sound" if found.sound else f"NOT SOUND: {found.chunks_damaged} chunks damaged")
    printer.report({"sound": found.sound, **found.document()}, lines)
    if found.sound:
        return ExitCode.DONE
    printer.error(
        "IntegrityError",
        f"{bundle}: expected every chunk to match its checksums, found {found.chunks_damaged} "
        f"damaged and {found.segments_missing} segments missing; a merge leaves these blocks "
        "missing, or copy the bundle again",
        ExitCode.DIFFERENCES,
    )
    return ExitCode.DIFFERENCES


@command.command("show")
@click.argument("bundle")
@json_option
@click.pass_obj
def show(invocation: Invocation, bundle: str) -> None:
    """Show what the manifest of BUNDLE says: a directory, a tar, or - for standard input.

    \b
    Example:
      dualrestore bundle show /media/truck/db.drb
    """
    from dualrestore.cli.printer import Printer, table
    from dualrestore.core import show_bundle
    from dualrestore.sizes import format_range, format_size

    told: dict[str, Any] = show_bundle(input_place(bundle))
    rows: list[tuple[str, str]] = []
    for key, value in told.items():
        if key in {"extents", "segments"}:
            continue
        is_size = isinstance(value, int) and ("bytes" in key or key in {"size", "block_size"})
        rows.append((key.replace("_", " "), format_size(value) if is_size else str(value)))
    extents = [format_range(offset, length) for offset, length in told.get("extents", [])]
    shown = ", ".join(extents[:8]) + (f" and {len(extents) - 8} more" if len(extents) > 8 else "")
    rows.append(("extents", shown))
    rows.append(("segments", str(len(told.get("segments", [])))))
    Printer(as_json=invocation.as_json).report(told, table(rows))


@command.command("extract")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE..")
@click.option(
    "--to",
    "destination",
    required=True,
    metavar="FILE|DISK|-",
    help="A new file, a disk, or - for standard output.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    show_default=True,
    help="qcow2 is written from front to back, also through a pipe.",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Also if a part of the volume is not there: not included, or on another medium.",
)
@click.option(
    "--force", is_flag=True, help="Write over a file that exists, or a disk that is not removable."
)
@opening_options
@json_option
@click.pass_obj
def extract(
    invocation: Invocation,
    bundles: tuple[str, ...],
    destination: str,
    *,
    form: str,
    partial: bool,
    force: bool,
    identity: Path | None,
    passphrase_file: Path | None,
    signers: Path | None,
) -> int:
    """Write the volume out of BUNDLE as an image; several are media of one bundle, in any order.

    BUNDLE is a directory, a tar (file or disk), or - for a tar on standard input, then alone and
    not as qcow2. Where chunks are damaged, or --partial leaves something out, a file has holes, a
    stream zeros and a disk what it held before; each such run is told, and the exit code is 3.

    \b
    Example:
      dualrestore bundle extract /media/truck/db.drb --to db.img
      dualrestore bundle extract /media/a/db /media/b/db --to /dev/sdc --force
      dualrestore bundle extract db.drb --format qcow2 --to - | ssh host 'cat > db.qcow2'
      ssh site cat db.tar | dualrestore bundle extract - --to db.img
    """
    import sys

    from dualrestore.cli.printer import Printer, speed
    from dualrestore.cli.secrets import opener_of
    from dualrestore.errors import ExitCode
    from dualrestore.jobs.bundle import ExtractOptions, extract_bundle
    from dualrestore.sizes import format_range, format_size

    to_output = destination == "-"
    place = sys.stdout.fileno() if to_output else Path(destination)
    printer = Printer(as_json=invocation.as_json, output_taken=to_output)
    with printer.progress("extract") as progress:
        report = extract_bundle(
            [input_place(bundle) for bundle in bundles],
            place,
            ExtractOptions(form, partial=partial, force=force),
            progress,
            opener=opener_of(identity, passphrase_file),
            signers=signers,
        )
    lines = [
        f"{destination}: {speed(report.size, report.seconds)} as {form}, "
        f"{format_size(report.bytes_data)} of it with contents"
    ]
    lines += [f"damaged: {format_range(*run)}" for run in report.damaged]
    lines += [f"absent: {format_range(*run)}" for run in report.absent]
    if not report.whole:
        lines.append(
            f"NOT WHOLE: {format_size(report.bytes_damaged)} damaged in {report.chunks_damaged} "
            f"chunks, {format_size(report.bytes_absent)} not there; the image does not have them"
        )
    if report.shortfall is not None:
        lines.append(report.shortfall)
    document = {"path": destination, "format": form, "whole": report.whole, **report.document()}
    printer.report(document, lines)
    return ExitCode.DONE if report.whole else ExitCode.DAMAGED_CHUNKS
