"""Merges bundles: into a volume that is being served, or into a file or device with a map.

Several media of one bundle are merged at once, those on different disks side by side; any order is
right (law 7), and repeating any of it changes nothing, so an interrupted merge is resumed by asking
again. A descriptor is a tar that is gone through once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualrestore.errors import UsageError
from dualrestore.model import MergeReport

if TYPE_CHECKING:
    from dualrestore.core import Known, PrimaryVolume, Progress, Trust


def check_sources(sources: Sequence[Path | int]) -> None:
    """Raises `UsageError` for one that is not there."""
    for source in sources:
        if isinstance(source, Path) and not source.exists():
            raise UsageError(f"{source}: expected a bundle or image, found nothing")


def _known(sources: Sequence[Path | int], trusts: "Sequence[Trust | None] | None") -> "list[Known]":
    check_sources(sources)
    return list(zip(sources, trusts or [None] * len(sources), strict=True))


@dataclass(frozen=True)
class OfflineOptions:
    """As `core.merge` takes them."""

    engine: str = "auto"
    undo: Path | None = None
    dry_run: bool = False


def revert(undo: Path, target: Path, map_path: Path) -> int:
    """Puts back what merges with `undo` overwrote; the bytes."""
    from dualrestore.core import OverwriteMap, merge_revert

    with OverwriteMap.open(map_path) as overwrite_map:
        return merge_revert(undo, target, overwrite_map)


def merge_offline(
    sources: Sequence[Path | int],
    target: Path,
    map_path: Path,
    progress: "Progress | None" = None,
    *,
    trusts: "Sequence[Trust | None] | None" = None,
    options: OfflineOptions | None = None,
) -> MergeReport:
    """Into a file or device that nobody serves, by the map beside it. `trusts`: what each source is
    held to (see `core.trusts_of`).
    """
    how = options or OfflineOptions()
    known = _known(sources, trusts)
    from dualrestore.core import OverwriteMap, merge

    if not target.exists():
        raise UsageError(f"{target}: expected the file or device to merge into, found nothing")
    with OverwriteMap.open(map_path) as overwrite_map:
        return merge(
            known,
            target,
            overwrite_map,
            progress,
            engine=how.engine,
            undo=how.undo,
            dry_run=how.dry_run,
        )


def merge_live(
    sources: Sequence[Path | int],
    volume: "PrimaryVolume",
    progress: "Progress | None" = None,
    *,
    trusts: "Sequence[Trust | None] | None" = None,
) -> MergeReport:
    """Into a volume under live I/O."""
    from dualrestore.core import merge_into_volume

    return merge_into_volume(_known(sources, trusts), volume, progress)
