"""`dualrestore bundle`: create, verify, show."""

import sys
from pathlib import Path
from typing import Any

import click

from dualrestore.cli.arguments import (
    COMPRESSION,
    RANGE,
    Invocation,
    config_option,
    input_place,
    json_option,
)
from dualrestore.cli.secrets import locking_options, opening_options


@click.group("bundle")
def command() -> None:
    """Create, verify or show a bundle: the snapshot copy in its shippable form.

    \b
    Example:
      dualrestore bundle create disk.img --to /media/truck/disk.drb
    """


@command.command("create")
@click.argument("source")
@click.option(
    "--to",
    "destination",
    required=True,
    metavar="DIR|FILE.tar|DISK|-",
    help="A new directory; or a tar: a new file, a disk, or - for standard output.",
)
@click.option("--select", "select", multiple=True, type=RANGE, metavar="RANGE")
@click.option(
    "--compress",
    type=COMPRESSION,
    default="none",
    show_default=True,
    metavar="auto|none|zstd[:N]",
    help="auto compresses what shrinks, while the sink does not wait for it.",
)
@locking_options
@config_option
@json_option
@click.pass_obj
def create(
    invocation: Invocation,
    source: str,
    destination: str,
    select: tuple[tuple[int, int], ...],
    compress: str,
    recipients: tuple[str, ...],
    passphrase_file: Path | None,
    plain: bool,
    sign: Path | None,
) -> None:
    """Write a bundle of SOURCE: an image or device, or NAME@SNAPSHOT at its backup's daemon.

    \b
    Example:
      dualrestore bundle create disk.img --to disk.drb --compress auto
      dualrestore bundle create disk.img --to /media/truck/disk.drb --recipient age1..
      dualrestore bundle create disk.img --to - | ssh site dualrestore merge - disk.img --map m
      dualrestore -c backup.toml bundle create db@7f3a --to /media/truck/db.drb
    """
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer, speed
    from dualrestore.cli.secrets import check_sign, encryption_document, encryption_of
    from dualrestore.errors import UsageError
    from dualrestore.model import BundleReport, read
    from dualrestore.sizes import format_size

    to_output = destination == "-"
    printer = Printer(as_json=invocation.as_json, output_taken=to_output)
    target = sys.stdout.fileno() if to_output else Path(destination).absolute()
    shown = "-" if to_output else str(target)
    selection = list(select) or None
    check_sign(sign, target)
    encryption = encryption_of(recipients, passphrase_file, plain=plain)
    with printer.progress("bundle") as progress:
        if "@" in source and not Path(source).exists():
            name, _, snapshot = source.partition("@")
            if to_output:
                raise UsageError("expected a directory or file of the daemon's host, found -")
            body = {
                "snapshot": snapshot,
                "destination": shown,
                "selection": selection,
                "compression": compress,
                "encryption": encryption_document(encryption),
            }
            client = daemon_of(invocation)
            report = read(BundleReport, client.job(f"/v1/volumes/{name}/bundle", body, progress))
            if sign is not None:
                from dualrestore.core import sign_bundle

                sign_bundle(Path(shown), sign)
        else:
            from dualrestore.jobs.bundle import BundleOptions, create_bundle

            options = BundleOptions(selection, compress, encryption=encryption, sign=sign)
            report = create_bundle(Path(source), target, options, progress)
    printer.report(
        {"path": shown, **report.document()},
        [
            f"{shown}: {speed(report.bytes_selected, report.seconds)}, "
            f"{format_size(report.bytes_stored)} stored in {report.segments} segments, "
            f"{format_size(report.bytes_zero)} zeros"
            + (f", {format_size(report.bytes_saved)} saved" if report.bytes_saved else "")
            + (", encrypted" if report.encrypted else "")
        ],
    )


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
