"""Declares what was lost, and opens the volume for business at once."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dualrestore.model import RestoreReport, read
from dualrestore.sizes import check_ranges

if TYPE_CHECKING:
    from dualrestore.core import PrimaryVolume

Lost = Sequence[tuple[int, int]] | Literal["all", "none"]


def restore(volume: "PrimaryVolume", lost: Lost) -> RestoreReport:
    """`lost`: (offset, length) ranges, `all` (the backup is right) or `none` (the primary is)."""
    began = time.monotonic()
    if not isinstance(lost, str):
        check_ranges(lost, volume.status()["size"])
    told = volume.restore(lost)
    return read(RestoreReport, {**told, "seconds": time.monotonic() - began})
