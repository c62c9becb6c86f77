"""Cuts a snapshot at the backup: through the primary while it runs, else at the backup itself."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualrestore.errors import UsageError
from dualrestore.model import SnapshotReport, read
from dualrestore.sizes import check_ranges, format_range, merge_ranges

if TYPE_CHECKING:
    from dualrestore.core import BackupVolume, PrimaryVolume

LABEL_CHARACTERS_MAX = 200
LABEL_BYTES_MAX = 255
SECTOR_BYTES = 512
TIMEOUT_SECONDS = 60.0
RANGES_MAX = 4096
"""What a message to the backup takes."""


@dataclass(frozen=True)
class SnapshotOptions:
    """`selection`: (offset, length); None selects everything."""

    label: str = ""
    selection: Sequence[tuple[int, int]] | None = None
    backup: int = 0
    timeout_seconds: float = TIMEOUT_SECONDS


def _selection(options: SnapshotOptions, size: int) -> list[tuple[int, int]] | None:
    """The selection as it may be sent: in order, disjoint, inside the volume."""
    # What a message to the backup cannot carry must not be found out while it is sent: that would
    # end the session of the mirror.
    size_of_label = len(options.label.encode(errors="replace"))
    if len(options.label) > LABEL_CHARACTERS_MAX or size_of_label > LABEL_BYTES_MAX:
        raise UsageError(
            f"expected a label of at most {LABEL_CHARACTERS_MAX} characters in {LABEL_BYTES_MAX} "
            f"bytes, found {len(options.label)} in {size_of_label}"
        )
    if any(unicodedata.category(symbol) in {"Cc", "Cs"} for symbol in options.label):
        raise UsageError(f"expected a label without control characters, found {options.label!r}")
    if options.selection is None:
        return None
    check_ranges(options.selection, size)
    for offset, length in options.selection:
        if offset % SECTOR_BYTES or length % SECTOR_BYTES:
            raise UsageError(
                f"expected a range in whole sectors of {SECTOR_BYTES} bytes, "
                f"found {format_range(offset, length)}"
            )
    merged = merge_ranges(options.selection)
    if len(merged) > RANGES_MAX:
        raise UsageError(f"expected at most {RANGES_MAX} separate ranges, found {len(merged)}")
    return merged


def snapshot_through_primary(volume: "PrimaryVolume", options: SnapshotOptions) -> SnapshotReport:
    """A cut in the stream of writes: everything acknowledged before it is in."""
    selection = _selection(options, volume.status()["size"])
    return read(
        SnapshotReport,
        volume.snapshot(
            options.label,
            selection=selection,
            backup=options.backup,
            timeout_ms=round(options.timeout_seconds * 1000),
        ),
    )


def snapshot_at_backup(volume: "BackupVolume", options: SnapshotOptions) -> SnapshotReport:
    """A cut of what the backup holds, while its primary is away."""
    selection = _selection(options, volume.status()["size"])
    return read(SnapshotReport, volume.snapshot(options.label, selection=selection))
