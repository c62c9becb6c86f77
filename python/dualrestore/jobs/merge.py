"""Merges bundles: into a volume that is being served, or into a file or device with a map.

Several media of one bundle are merged one after the other; any order is right (law 7), and
repeating any of it changes nothing, so an interrupted merge is resumed by asking again. A
descriptor is a tar that is gone through once.
"""

from collections.abc import Callable, Sequence
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


def _merge_each(
    sources: "Sequence[Known]",
    check_all: "Callable[[Sequence[Known]], None]",
    merge_one: "Callable[[Known, Progress | None], MergeReport]",
    progress: "Progress | None",
) -> MergeReport:
    from dualrestore.core import is_stream

    at_rest = [source for source in sources if not is_stream(source[0])]
    if len(at_rest) > 1:
        # A wrong one among them is refused before any is merged. A stream is known when it comes.
        check_all(at_rest)
    finished = 0

    def relay(counters: dict[str, int]) -> None:
        if progress is not None:
            progress({**counters, "medium": finished + 1, "media": len(sources)})

    total: MergeReport | None = None
    for source in sources:
        report = merge_one(source, relay if progress is not None else None)
        total = report if total is None else total + report
        finished += 1
    assert total is not None, "the command line asks for at least one source"
    return total


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
    from dualrestore.core import OverwriteMap, check_merge, merge

    if not target.exists():
        raise UsageError(f"{target}: expected the file or device to merge into, found nothing")
    with OverwriteMap.open(map_path) as overwrite_map:
        return _merge_each(
            known,
            lambda all_of_them: check_merge(all_of_them, target, overwrite_map),
            lambda one, report: merge(
                one[0],
                target,
                overwrite_map,
                report,
                trust=one[1],
                engine=how.engine,
                undo=how.undo,
                dry_run=how.dry_run,
            ),
            progress,
        )


def merge_live(
    sources: Sequence[Path | int],
    volume: "PrimaryVolume",
    progress: "Progress | None" = None,
    *,
    trusts: "Sequence[Trust | None] | None" = None,
) -> MergeReport:
    """Into a volume under live I/O."""
    from dualrestore.core import check_merge_into_volume, merge_into_volume

    return _merge_each(
        _known(sources, trusts),
        lambda all_of_them: check_merge_into_volume(all_of_them, volume),
        lambda one, report: merge_into_volume(one[0], volume, report, trust=one[1]),
        progress,
    )
