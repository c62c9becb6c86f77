"""Dual-channel restoration of a volume: live over a thin link, bulk from a shipped medium.

>>> import dualrestore as dr
>>> dr.Extent(4096, 8192).end
12288
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dualrestore.core import Bundle, BundleChunk, ByteBuffer, OverwriteMap, merge
    from dualrestore.errors import (
        BusyError,
        ConfigurationError,
        DeadlineError,
        DeviceError,
        DualRestoreError,
        FormatError,
        IdentityError,
        IntegrityError,
        InterruptedJobError,
        LinkError,
        LockedError,
        NextMediumError,
        PoisonedError,
        SignatureError,
        UsageError,
    )
    from dualrestore.model import (
        BundleExtent,
        BundleReport,
        BundleVerification,
        Extent,
        ExtractReport,
        MergeReport,
    )
    from dualrestore.transport.nbd_source import open_export

_HOMES = {
    "Bundle": "core",
    "BundleChunk": "core",
    "BundleExtent": "model",
    "BundleReport": "model",
    "BundleVerification": "model",
    "BusyError": "errors",
    "ByteBuffer": "core",
    "ConfigurationError": "errors",
    "DeadlineError": "errors",
    "DeviceError": "errors",
    "DualRestoreError": "errors",
    "Extent": "model",
    "ExtractReport": "model",
    "FormatError": "errors",
    "IdentityError": "errors",
    "IntegrityError": "errors",
    "InterruptedJobError": "errors",
    "LinkError": "errors",
    "LockedError": "errors",
    "MergeReport": "model",
    "NextMediumError": "errors",
    "OverwriteMap": "core",
    "PoisonedError": "errors",
    "SignatureError": "errors",
    "UsageError": "errors",
    "merge": "core",
    "open_export": "transport.nbd_source",
}

__all__ = [
    "Bundle",
    "BundleChunk",
    "BundleExtent",
    "BundleReport",
    "BundleVerification",
    "BusyError",
    "ByteBuffer",
    "ConfigurationError",
    "DeadlineError",
    "DeviceError",
    "DualRestoreError",
    "Extent",
    "ExtractReport",
    "FormatError",
    "IdentityError",
    "IntegrityError",
    "InterruptedJobError",
    "LinkError",
    "LockedError",
    "MergeReport",
    "NextMediumError",
    "OverwriteMap",
    "PoisonedError",
    "SignatureError",
    "UsageError",
    "__version__",
    "merge",
    "open_export",
]


def __getattr__(name: str) -> Any:
    # The command line asks for the version every few seconds; nothing else is loaded for that.
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'dualrestore' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"dualrestore.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
