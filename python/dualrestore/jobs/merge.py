"""Merges bundles: into a volume that is being served, or into a file or device with a map.

Several media of one bundle are merged at once, those on different disks side by side; any order is
right (law 7), and repeating any of it changes nothing, so an interrupted merge is resumed by asking
again. A descriptor is a tar that is gone through once.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from dualrestore.errors import UsageError
from dualrestore.model import MergeReport
from dualrestore.transport.nbd_uri import NbdUri

if TYPE_CHECKING:
    from ssl import SSLContext

    from dualrestore.core import Known, PrimaryVolume, Progress, Trust

Source = Path | int | NbdUri
"""A bundle or image by its path, a tar by its descriptor, or an export by its URI."""


def check_sources(sources: Sequence[Source]) -> None:
    """Raises `UsageError` for one that is not there."""
    for source in sources:
        if isinstance(source, Path) and not source.exists():
            raise UsageError(f"{source}: expected a bundle or image, found nothing")


def is_local(source: Source) -> TypeGuard[Path | int]:
    """Whether it needs no server."""
    return not isinstance(source, NbdUri)


@contextlib.contextmanager
def _opened(
    sources: Sequence[Source],
    trusts: "Sequence[Trust | None] | None",
    tls: "SSLContext | Path | None",
) -> "Iterator[list[Known]]":
    """As the core takes them, connected to as long as it lasts."""
    check_sources(sources)
    known: list[Known] = []
    with contextlib.ExitStack() as connected:
        for source, trust in zip(sources, trusts or [None] * len(sources), strict=True):
            if isinstance(source, NbdUri):
                from dualrestore.transport.nbd_source import open_export

                known.append((connected.enter_context(open_export(source, tls)), trust))
            else:
                known.append((source, trust))
        yield known


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
    sources: Sequence[Source],
    target: Path,
    map_path: Path,
    progress: "Progress | None" = None,
    *,
    trusts: "Sequence[Trust | None] | None" = None,
    options: OfflineOptions | None = None,
    tls: Path | None = None,
) -> MergeReport:
    """Into a file or device that nobody serves, by the map beside it. `trusts`: what each source is
    held to (see `core.trusts_of`); `tls`: directory of certificates for exports that name none.
    """
    how = options or OfflineOptions()
    from dualrestore.core import OverwriteMap, merge

    check_sources(sources)
    if not target.exists():
        raise UsageError(f"{target}: expected the file or device to merge into, found nothing")
    with OverwriteMap.open(map_path) as overwrite_map, _opened(sources, trusts, tls) as known:
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
    sources: Sequence[Source],
    volume: "PrimaryVolume",
    progress: "Progress | None" = None,
    *,
    trusts: "Sequence[Trust | None] | None" = None,
    tls: "SSLContext | None" = None,
) -> MergeReport:
    """Into a volume under live I/O. `tls`: for exports that name no certificates."""
    from dualrestore.core import merge_into_volume

    with _opened(sources, trusts, tls) as known:
        return merge_into_volume(known, volume, progress)
