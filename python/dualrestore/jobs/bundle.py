"""Makes bundles of images and snapshots, checks them, and makes images of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dualrestore.errors import UsageError
from dualrestore.model import BundleReport, BundleVerification, ExtractReport
from dualrestore.sizes import check_ranges
from dualrestore.transport.nbd_uri import NbdUri

if TYPE_CHECKING:
    from dualrestore.core import Encryption, NbdSource, Progress, SnapshotSource
    from dualrestore.keys import Opener


@dataclass(frozen=True)
class BundleOptions:
    """`selection`: (offset, length); None selects what the source selects, else everything.

    `partitions`: numbers; `allocated`: holes of the source are left out; `since`: the snapshot of
    a cut, for what changed from there. `state`: where the record is kept with which a later call
    may `proceed`; None: nowhere. `encryption` has the key, and who may open it; `sign` is the file
    of an SSH key.
    """

    selection: Sequence[tuple[int, int]] | None = None
    compression: str = "none"
    block_size: int = 4096
    medium_size: int | None = None
    partitions: Sequence[int] = ()
    allocated: bool = False
    since: str | None = None
    proceed: bool = False
    state: Path | None = None
    encryption: "Encryption | None" = None
    sign: Path | None = None
    force: bool = False
    """Also onto a disk that is not removable."""
    release: str | None = None
    """Of a snapshot; see `dualrestore._core.BackupVolume.source`."""


def create_bundle(
    source: "Path | NbdUri | SnapshotSource | NbdSource",
    media: Sequence[Path | int],
    options: BundleOptions,
    progress: "Progress | None" = None,
    *,
    tls: Path | None = None,
) -> BundleReport:
    """Over directories, each new or empty, as much as they take; or a tar (see `write_bundle`).
    `tls`: directory of certificates for an export that names none.
    """
    if isinstance(source, NbdUri):
        from dualrestore.transport.nbd_source import open_export

        with open_export(source, tls) as export:
            return create_bundle(export, media, options, progress)
    if isinstance(source, Path):
        if not source.exists():
            raise UsageError(f"{source}: expected an image to make a bundle of, found nothing")
        if options.selection and source.is_file():
            check_ranges(options.selection, source.stat().st_size)
    from dualrestore.core import write_bundle

    return write_bundle(
        source,
        media,
        options.selection,
        medium_size=options.medium_size,
        partitions=options.partitions,
        allocated=options.allocated,
        since=options.since,
        compression=options.compression,
        block_size=options.block_size,
        proceed=options.proceed,
        state=options.state,
        encryption=options.encryption,
        sign=options.sign,
        force=options.force,
        progress=progress,
    )


def verify_bundle(
    place: Path | int,
    progress: "Progress | None" = None,
    *,
    opener: "Opener | None" = None,
    signers: Path | None = None,
) -> BundleVerification:
    """Reads every chunk of a bundle, its signature first."""
    from dualrestore.core import trusts_of
    from dualrestore.core import verify_bundle as verify

    [trust] = trusts_of([place], opener, signers)
    return verify(place, progress, trust=trust)


@dataclass(frozen=True)
class ExtractOptions:
    """`format`: `raw` or `qcow2`; `partial`: a part of the volume will do; `force`: also over a
    file that exists, or a disk that is not removable.
    """

    format: str = "raw"
    partial: bool = False
    force: bool = False


def extract_bundle(
    media: Sequence[Path | int],
    destination: Path | int,
    options: ExtractOptions,
    progress: "Progress | None" = None,
    *,
    opener: "Opener | None" = None,
    signers: Path | None = None,
) -> ExtractReport:
    """Writes the volume out of media of one bundle, their signatures first."""
    from dualrestore.core import extract_bundle as extract
    from dualrestore.core import trusts_of

    for medium in media:
        if isinstance(medium, Path) and not medium.exists():
            raise UsageError(f"{medium}: expected a bundle, found nothing")
    trusts = trusts_of(media, opener, signers)
    return extract(
        list(zip(media, trusts, strict=True)),
        destination,
        format=options.format,
        partial=options.partial,
        force=options.force,
        progress=progress,
    )
