"""Attaches bundles to a volume: missing blocks are read from them at local speed, before they are
merged and while they are. Several media of one bundle are attached one by one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualrestore.errors import UsageError
from dualrestore.model import AttachedMedium, AttachReport, read

if TYPE_CHECKING:
    from dualrestore.core import BundleKey, PrimaryVolume


def attach(
    bundles: Sequence[Path],
    volume: "PrimaryVolume",
    keys: "Sequence[BundleKey | None] | None" = None,
) -> AttachReport:
    """All of them, or none: a wrong one takes those before it back. `keys`: of encrypted ones."""
    before = {medium["path"] for medium in volume.status()["media"]}
    media: dict[str, AttachedMedium] = {}
    try:
        for bundle, key in zip(bundles, keys or [None] * len(bundles), strict=True):
            media[str(bundle)] = read(AttachedMedium, volume.attach(str(bundle), key=key))
    except BaseException:
        for path in media.keys() - before:
            volume.detach(path)
        raise
    return AttachReport(media=list(media.values()))


def detach(bundle: Path, volume: "PrimaryVolume") -> AttachReport:
    """Raises `UsageError` if it was not attached."""
    if not volume.detach(str(bundle)):
        media = volume.status()["media"]
        known = ", ".join(medium["path"] for medium in media) or "none"
        raise UsageError(f"expected an attached bundle ({known}), found {str(bundle)!r}")
    media = [read(AttachedMedium, medium) for medium in volume.status()["media"]]
    return AttachReport(media=media)
