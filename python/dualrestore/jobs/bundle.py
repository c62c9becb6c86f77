"""Makes bundles of images and snapshots, and checks them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dualrestore.errors import UsageError
from dualrestore.model import BundleReport, BundleVerification
from dualrestore.sizes import check_ranges

if TYPE_CHECKING:
    from dualrestore.core import Progress, SnapshotSource


@dataclass(frozen=True)
class BundleOptions:
    """`selection`: (offset, length); None selects what the source selects, else everything."""

    selection: Sequence[tuple[int, int]] | None = None
    compression: Literal["none", "zstd"] = "none"
    level: int = 1
    block_size: int = 4096


def create_bundle(
    source: "Path | SnapshotSource",
    destination: Path | int,
    options: BundleOptions,
    progress: "Progress | None" = None,
) -> BundleReport:
    """Writes a directory, which must not exist or be empty, or a tar (see `write_bundle`)."""
    if isinstance(source, Path):
        if not source.exists():
            raise UsageError(f"{source}: expected an image to make a bundle of, found nothing")
        if options.selection and source.is_file():
            check_ranges(options.selection, source.stat().st_size)
    from dualrestore.core import write_bundle

    return write_bundle(
        source,
        destination,
        options.selection,
        compression=options.compression,
        level=options.level,
        block_size=options.block_size,
        progress=progress,
    )


def verify_bundle(path: Path | int, progress: "Progress | None" = None) -> BundleVerification:
    """Reads every chunk of a bundle."""
    from dualrestore.core import verify_bundle as verify

    return verify(path, progress)
