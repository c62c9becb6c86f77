"""Cuts a snapshot at the backup: through the primary while it runs, else at the backup itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dualrestore.errors import UsageError
from dualrestore.model import SnapshotReport, read
from dualrestore.sizes import check_ranges

if TYPE_CHECKING:
    from dualrestore.core import BackupVolume, PrimaryVolume

LABEL_CHARACTERS_MAX = 200
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class SnapshotOptions:
    """`selection`: (offset, length); None selects everything."""

    label: str = ""
    selection: Sequence[tuple[int, int]] | None = None
    backup: int = 0
    timeout_seconds: float = TIMEOUT_SECONDS


def _check(options: SnapshotOptions, size: int) -> None:
    if len(options.label) > LABEL_CHARACTERS_MAX:
        raise UsageError(
            f"expected a label of at most {LABEL_CHARACTERS_MAX} characters, "
            f"found {len(options.label)}"
        )
    check_ranges(options.selection or [], size)


def snapshot_through_primary(volume: "PrimaryVolume", options: SnapshotOptions) -> SnapshotReport:
    """A cut in the stream of writes: everything acknowledged before it is in."""
    _check(options, volume.status()["size"])
    return read(
        SnapshotReport,
        volume.snapshot(
            options.label,
            selection=options.selection,
            backup=options.backup,
            timeout_ms=round(options.timeout_seconds * 1000),
        ),
    )


def snapshot_at_backup(volume: "BackupVolume", options: SnapshotOptions) -> SnapshotReport:
    """A cut of what the backup holds, while its primary is away."""
    _check(options, volume.status()["size"])
    return read(SnapshotReport, volume.snapshot(options.label, selection=options.selection))
