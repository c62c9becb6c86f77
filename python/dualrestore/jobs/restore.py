"""Declares what was lost, and opens the volume for business at once."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dualrestore.model import RestoreReport, read
from dualrestore.sizes import check_ranges

if TYPE_CHECKING:
    from dualrestore.core import PrimaryVolume

Lost = Sequence[tuple[int, int]] | Literal["all", "none"]


def restore(volume: "PrimaryVolume", lost: Lost, *, wire: bool) -> RestoreReport:
    """`lost`: (offset, length) ranges, `all` (the backup is the truth) or `none` (the primary is).

    `wire`: bring what is missing over the link too, behind the live requests.
    """
    began = time.monotonic()
    if not isinstance(lost, str):
        check_ranges(lost, volume.status()["size"])
    told = volume.restore(lost)
    volume.hydrate(wire)
    return read(RestoreReport, {**told, "seconds": time.monotonic() - began})
