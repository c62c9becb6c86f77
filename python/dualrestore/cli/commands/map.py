"""`dualrestore map`: create, mark, show, export, picture."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualrestore.cli.arguments import RANGE, SIZE, Invocation, config_option, json_option

if TYPE_CHECKING:
    from dualrestore.cli.printer import Printer

SHADES = " .:-=+*#%@"
"""From nothing current to everything current."""


@click.group("map")
def command() -> None:
    """Overwrite maps: which blocks of a volume are current.

    \b
    Example:
      dualrestore map create over.map --size 64MiB
    """


def _printer(invocation: Invocation) -> "Printer":
    from dualrestore.cli.printer import Printer

    return Printer(as_json=invocation.as_json)


@command.command("create")
@click.argument("path", metavar="MAP", type=click.Path(path_type=Path))
@click.option("--size", type=SIZE, required=True, help="Size of the volume.")
@click.option("--block-size", type=SIZE, default="4KiB", show_default=True)
@click.option(
    "--volume", metavar="UUID", help="The volume that it is of; else the first merge says."
)
@click.option("--generation", type=click.IntRange(1, 2**64 - 1), default=1, show_default=True)
@json_option
@click.pass_obj
def create(
    invocation: Invocation,
    path: Path,
    size: int,
    block_size: int,
    volume: str | None,
    generation: int,
) -> None:
    """Create MAP for a volume of which everything is missing.

    \b
    Example:
      dualrestore map create over.map --size 64MiB --block-size 4KiB
    """
    from dualrestore.core import OverwriteMap

    with OverwriteMap.create(
        path, size, block_size, volume=volume, generation=generation
    ) as created:
        document = _describe(created)
    _report(invocation, document)


@command.command("mark")
@click.argument("path", metavar="MAP", type=click.Path(path_type=Path))
@click.argument("ranges", nargs=-1, required=True, type=RANGE, metavar="RANGE..")
@json_option
@click.pass_obj
def mark(invocation: Invocation, path: Path, ranges: tuple[tuple[int, int], ...]) -> None:
    """Mark ranges current: a merge leaves them as they are.

    \b
    Example:
      dualrestore map mark over.map 0-1MiB 33MiB-34MiB
    """
    from dualrestore.core import OverwriteMap
    from dualrestore.sizes import check_ranges

    with OverwriteMap.open(path) as opened:
        # All of them are looked at before the first is marked.
        check_ranges(ranges, opened.size)
        _check_alignment(ranges, opened.size, opened.block_size)
        for offset, length in ranges:
            opened.mark_current(offset, length)
        document = _describe(opened)
    _report(invocation, document)


def _check_alignment(ranges: tuple[tuple[int, int], ...], size: int, block_size: int) -> None:
    from dualrestore.errors import UsageError
    from dualrestore.sizes import format_range

    for offset, length in ranges:
        end = offset + length
        if offset % block_size or (end % block_size and end != size):
            raise UsageError(
                f"expected a range of whole blocks of {block_size} bytes, "
                f"found {format_range(offset, length)}"
            )


def _describe(opened: Any) -> dict[str, Any]:
    return {
        "path": opened.path,
        "volume": opened.volume,
        "size": opened.size,
        "block_size": opened.block_size,
        "generation": opened.generation,
        "current_bytes": opened.current_bytes,
        "missing_bytes": opened.missing_bytes,
    }


def _report(invocation: Invocation, document: dict[str, Any]) -> None:
    from dualrestore.cli.printer import size_and_share, table
    from dualrestore.sizes import format_size

    size = document["size"]
    rows = [
        ("map", document["path"]),
        ("volume", document["volume"] or "none: the first bundle of a volume binds it"),
        ("size", format_size(size)),
        ("block size", format_size(document["block_size"])),
        ("generation", str(document["generation"])),
        ("current", size_and_share(document["current_bytes"], size)),
        ("missing", size_and_share(document["missing_bytes"], size)),
    ]
    _printer(invocation).report(document, table(rows))


@command.command("show")
@click.argument("which", metavar="MAP_or_NAME")
@config_option
@json_option
@click.pass_obj
def show(invocation: Invocation, which: str) -> None:
    """Show identity and totals of a map file, or of the map of a live volume.

    \b
    Example:
      dualrestore map show over.map --json
    """
    _report(invocation, _Source(invocation, which).describe())


class _Source:
    """A map file, or the map of a volume that the daemon serves."""

    def __init__(self, invocation: Invocation, which: str) -> None:
        self._invocation = invocation
        self._which = which
        self._is_file = "/" in which or Path(which).exists() or not self._has_config()

    def _has_config(self) -> bool:
        from dualrestore.config import configured_path
        from dualrestore.errors import UsageError

        try:
            configured_path(self._invocation.config)
        except UsageError:
            return False
        return True

    def _ask(self, path: str) -> Any:
        from dualrestore.cli.daemon import daemon_of

        client = daemon_of(self._invocation)
        return client.call("GET", f"/v1/volumes/{self._which}{path}")

    def describe(self) -> dict[str, Any]:
        if self._is_file:
            from dualrestore.core import OverwriteMap

            with OverwriteMap.open(self._which) as opened:
                return _describe(opened)
        status = self._ask("")
        keys = ("volume", "size", "block_size", "generation", "current_bytes", "missing_bytes")
        return {"path": self._which, **{key: status[key] for key in keys}}

    def current_extents(self) -> list[tuple[int, int]]:
        if self._is_file:
            from dualrestore.core import OverwriteMap

            with OverwriteMap.open(self._which) as opened:
                return [(run.offset, run.length) for run in opened.current_extents()]
        return [(offset, length) for offset, length in self._ask("/map/current")]

    def picture(self, cells: int) -> list[int]:
        if self._is_file:
            from dualrestore.core import OverwriteMap

            with OverwriteMap.open(self._which) as opened:
                return opened.picture(cells)
        counts: list[int] = self._ask(f"/picture?cells={cells}")
        return counts


def ddrescue_lines(current: list[tuple[int, int]], size: int) -> Iterator[str]:
    """The map as GNU ddrescue writes it: `+` current, `?` missing."""
    yield "# Mapfile. Created by dualrestore"
    yield "# current_pos  current_status  current_pass"
    yield f"0x{0:08X}     ?               1"
    yield "#      pos        size  status"
    at = 0
    for offset, length in [*current, (size, 0)]:
        if offset > at:
            yield f"0x{at:08X}  0x{offset - at:08X}  ?"
        if length:
            yield f"0x{offset:08X}  0x{length:08X}  +"
        at = offset + length


@command.command("export")
@click.argument("which", metavar="MAP_or_NAME")
@click.option(
    "--format", "kind", type=click.Choice(["json", "ddrescue"]), default="json", show_default=True
)
@config_option
@json_option
@click.pass_obj
def export(invocation: Invocation, which: str, kind: str) -> None:
    """Print the current extents for other programs (ddrescue, nbdkit's ddrescue filter).

    \b
    Example:
      dualrestore map export over.map --format ddrescue > over.mapfile
    """
    source = _Source(invocation, which)
    document = source.describe()
    current = source.current_extents()
    printer = _printer(invocation)
    if kind == "ddrescue" and not invocation.as_json:
        printer.text("\n".join(ddrescue_lines(current, document["size"])) + "\n")
        return
    printer.text(json.dumps({**document, "current": current}) + "\n")


def draw(counts: list[int], size: int, block_size: int) -> str:
    """One character a cell."""
    cells, blocks = len(counts), -(-size // block_size)
    drawn = []
    for index, count in enumerate(counts):
        first, end = (blocks * edge // cells * block_size for edge in (index, index + 1))
        whole = min(end, size) - first
        share = count / whole if whole else 0
        # Only a cell with nothing current is blank, only a full one is '@'.
        shade = 0 if count == 0 else min(1 + int(share * (len(SHADES) - 2)), len(SHADES) - 1)
        drawn.append(SHADES[shade])
    return "".join(drawn)


@command.command("picture")
@click.argument("which", metavar="MAP_or_NAME")
@click.option("--rows", type=click.IntRange(1, 200), default=16, show_default=True)
@config_option
@json_option
@click.pass_obj
def picture(invocation: Invocation, which: str, rows: int) -> None:
    """Draw the map: blank is missing, @ is current, what lies between is partly current.

    \b
    Example:
      dualrestore map picture over.map
    """
    from dualrestore.sizes import format_size

    width = max(16, min(96, shutil.get_terminal_size().columns - 12))
    source = _Source(invocation, which)
    described = source.describe()
    size, block_size = described["size"], described["block_size"]
    cells = max(1, min(width * rows, -(-size // block_size)))
    counts = source.picture(cells)
    drawn = draw(counts, size, block_size)
    lines = [
        f"{format_size(size * at // cells):>10} |{drawn[at : at + width]}|"
        for at in range(0, cells, width)
    ]
    _printer(invocation).report({"size": size, "cells": counts}, lines)
