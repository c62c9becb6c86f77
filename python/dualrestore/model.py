"""Reports and statuses as typed values.

Guarantees: `read(Type, document)` accepts documents with further keys (newer core, older client)
and refuses those that lack one. Does not know: where a document came from.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

from dualrestore.errors import FormatError, error_document, error_from


class Extent(NamedTuple):
    """`length` bytes from `offset`."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


class BundleExtent(NamedTuple):
    """`length` bytes of a volume from `offset` that a bundle holds, and what they are."""

    offset: int
    length: int
    kind: Literal["data", "zero"]

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.offset + self.length


class Stream(int):
    """A descriptor that a tar comes through, with what it is called in messages."""

    name: str

    def __new__(cls, descriptor: int, name: str) -> "Stream":
        stream = super().__new__(cls, descriptor)
        stream.name = name
        return stream

    def __str__(self) -> str:
        return self.name


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A report or status that can be shown as a document."""

    def document(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built


class SourceReport(Record, frozen=True, kw_only=True):
    """What a merge did with one of its sources. `bytes_total` of it were dealt with.

    `chunks_repaired` were damaged in it and came another way; `chunks_damaged` are still missing.
    """

    source: str
    bytes_total: int
    bytes_written: int
    bytes_read: int
    chunks_total: int
    chunks_repaired: int
    chunks_damaged: int
    damaged: list[tuple[int, int]] = []
    """(offset, length) of the first of both."""
    shortfall: str | None = None
    error: dict[str, Any] | None = None
    """Why it was given up, as `errors.error_document` tells it; what came before stays merged."""


class MergeReport(Record, frozen=True, kw_only=True):
    """What a merge did, all sources together. All but `seconds` and the counts are bytes.

    `bytes_skipped` were selected by the bundle and already current; `chunks_repaired` were damaged
    on a medium and came from another one, or over the link; `chunks_damaged` are still missing.
    After a crash a bundle may be too old for some blocks (law 5): `bytes_fetched` of them came over
    the link, `bytes_in_doubt` are still missing because it was down. Of a bundle of an earlier
    generation `bytes_stale` were not vouched for by the backup and are still missing.
    """

    bytes_written: int
    bytes_skipped: int
    bytes_zeroed: int
    chunks_repaired: int
    chunks_damaged: int
    seconds: float
    bytes_total: int = 0
    bytes_read: int = 0
    bytes_fetched: int = 0
    bytes_in_doubt: int = 0
    bytes_stale: int = 0
    engine: str = ""
    """What carried out the reads and writes: `io_uring` or `threads`."""
    shortfall: str | None = None
    """Why less came than a source holds: it was cut off. What came whole was merged."""
    side_by_side: int = 1
    """So many sources were read at a time, at most: those on different disks are."""
    sources: list[SourceReport] = []
    """By source, in the order in which they were given."""

    def raise_failed(self) -> None:
        """Raises the error of the first source that was given up, with all of them in its text and
        this report as its `report`.
        """
        failed = [one for one in self.sources if one.error is not None]
        if not failed:
            return
        words = "; ".join(f"{one.source}: {(one.error or {})['message']}" for one in failed)
        if len(self.sources) > 1:
            merged = len(self.sources) - len(failed)
            words += f" ({merged} of {len(self.sources)} sources were merged whole)"
        problem = error_from({**(failed[0].error or {}), "message": words})
        problem.report = self.document()
        raise problem


class BundleReport(Record, frozen=True, kw_only=True):
    """What was written into a bundle, on all its media so far.

    `media` of them are finished; `bytes_left` of the selection wait for a further one.
    """

    bundle: str
    volume: str | None
    generation: int
    bytes_selected: int
    bytes_data: int
    bytes_zero: int
    bytes_stored: int
    chunks: int
    segments: int
    seconds: float
    bytes_saved: int = 0
    """By compression, of what the data would take."""
    chunks_compressed: int = 0
    chunks_untried: int = 0
    """Stored as they were because compressing would have held the sink up (`auto`)."""
    encrypted: bool = False
    media: int = 1
    bytes_left: int = 0

    @property
    def complete(self) -> bool:
        """Nothing is left for a further medium."""
        return not self.bytes_left


class Disk(Record, frozen=True, kw_only=True):
    """The disk behind a path, as the kernel describes it. `size` is in bytes."""

    device: str
    model: str | None
    serial: str | None
    size: int
    removable: bool


class BundleVerification(Record, frozen=True, kw_only=True):
    """What reading every chunk of a bundle found."""

    bytes_checked: int
    chunks_checked: int
    chunks_damaged: int
    segments_missing: int
    damaged: list[tuple[int, int]]
    problems: list[str]
    seconds: float

    @property
    def sound(self) -> bool:
        """Nothing is damaged or absent."""
        return not (self.chunks_damaged or self.segments_missing or self.problems)


class ExtractReport(Record, frozen=True, kw_only=True):
    """What was written out of a bundle as an image. All but `seconds` and the chunk counts are
    bytes.

    The volume's `size` is `bytes_data`, `bytes_zero`, `bytes_damaged` (of chunks that are damaged,
    or were unreadable when the bundle was made) and `bytes_absent` (not in the bundle, or on none
    of its media that were given). `damaged` and `absent` hold (offset, length), the first 10000
    each; both are holes of a raw file, zeros of a stream and of qcow2, and on a disk what was there
    before. `bytes_output` is the length of the image.
    """

    size: int
    bytes_data: int
    bytes_zero: int
    bytes_damaged: int
    bytes_absent: int
    bytes_output: int
    chunks_total: int
    chunks_damaged: int
    damaged: list[tuple[int, int]]
    absent: list[tuple[int, int]]
    seconds: float
    shortfall: str | None = None
    """Why less came than the bundle holds: it was cut off."""

    @property
    def whole(self) -> bool:
        """The image is all of the volume, and its source said so to the end."""
        return not (self.bytes_damaged or self.bytes_absent or self.shortfall)


class SnapshotReport(Record, frozen=True, kw_only=True):
    """A snapshot at the backup. `selection` holds (offset, length); empty means everything."""

    snapshot: str
    label: str
    generation: int
    sequence: int
    created: int = 0
    """Seconds since 1970."""
    selection: list[tuple[int, int]] = []
    preserved_bytes: int = 0
    released_bytes: int = 0
    """Given back after they were written to a bundle: they can be read from that alone."""
    broken: str | None = None
    """Why it no longer holds what it promised, if so."""


class RestoreReport(Record, frozen=True, kw_only=True):
    """A loss was declared and the volume opened."""

    generation: int
    missing_bytes: int
    seconds: float = 0.0


class VerifyReport(Record, frozen=True, kw_only=True):
    """Digests of both sides, compared range by range.

    `unsettled` are ranges that were written to at every try; nothing is said of them.
    """

    bytes_compared: int
    bytes_missing: int
    bytes_different: int
    different: list[tuple[int, int]]
    unsettled: list[tuple[int, int]]
    bytes_repaired: int
    seconds: float

    @property
    def same(self) -> bool:
        """Nothing differs."""
        return not self.bytes_different


class BackupLink(Record, frozen=True, kw_only=True):
    """What a primary knows of one of its backups."""

    connected: bool
    demand: str
    mirror: str
    bulk: str
    unsent_bytes: int
    resyncing: bool
    in_flight_bytes: int = 0
    lag_bytes: int = 0
    """Writes since it was connected that it has not made durable."""
    lag_ms: int = 0
    """How long ago the oldest of them was sent."""
    error: str | None = None
    address: str = ""
    """Filled by the daemon, with the transport's own error when the core has none."""


class AttachedMedium(Record, frozen=True, kw_only=True):
    """A bundle that missing blocks are read from. See `dualrestore._core.PrimaryVolume.attach`."""

    path: str
    state: str
    """`opening`, `attached`, `unvouched`, `gone` or `refused`."""
    bundle: str
    generation: int
    sequence: int
    bytes_covered: int
    bytes_supplied: int
    reads_damaged: int
    error: str | None = None


class AttachReport(Record, frozen=True, kw_only=True):
    """The media that were attached, or what is left attached after one was detached."""

    media: list[AttachedMedium]


class PrimaryStatus(Record, frozen=True, kw_only=True):
    """A volume in the role primary. See `dualrestore._core.PrimaryVolume.status`."""

    name: str
    state: str
    volume: str | None
    size: int
    block_size: int
    generation: int
    current_bytes: int
    missing_bytes: int
    unsent_bytes: int
    mirrored: bool
    backups: list[BackupLink]
    role: str = "primary"
    media: list[AttachedMedium] = []
    link_only_bytes: int = 0
    hot_extents: int = 0
    hydrating: bool = False
    error: str | None = None
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    bytes_read: int = 0
    bytes_written_live: int = 0
    fetches: int = 0
    bytes_fetched: int = 0
    bytes_hydrated: int = 0
    bytes_merged: int = 0
    bytes_from_media: int = 0
    bytes_skipped_current: int = 0
    bytes_resent: int = 0
    bytes_found_equal: int = 0
    """Of what a backup was presumed to lack, what it held and was not sent."""
    errors: int = 0
    connections: int = 0
    exports: list[str] = []


class BackupStatus(Record, frozen=True, kw_only=True):
    """A volume in the role backup. See `dualrestore._core.BackupVolume.status`."""

    name: str
    state: str
    volume: str | None
    size: int
    block_size: int
    generation: int
    connected: bool
    role: str = "backup"
    changed_bytes: int = 0
    error: str | None = None
    links: dict[str, str] = {}
    primary: str | None = None
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    bytes_sent: int = 0
    bytes_mirrored: int = 0
    bytes_preserved: int = 0
    store_free_bytes: int | None = None
    """Room for old contents on the file system of the state directory; None if it cannot tell."""
    store_total_bytes: int | None = None
    store_low: bool = False
    """Little of it is left, and there are snapshots that a full one would break."""
    snapshots_broken: dict[str, str] = {}
    """Which cannot be read any more, and why."""
    warnings: list[str] = []
    snapshots: list[SnapshotReport] = []
    connections: int = 0
    exports: list[str] = []


class JobStatus(Record, frozen=True, kw_only=True):
    """A long verb that the daemon is doing or has done."""

    job: int
    verb: str
    volume: str
    state: str
    """`running`, `done` or `failed`."""
    progress: dict[str, int] = {}
    error: str | None = None
    seconds: float = 0.0


class NodeStatus(Record, frozen=True, kw_only=True):
    """A whole daemon."""

    version: str
    seconds_up: float
    link_bytes_sent: int
    link_bytes_received: int
    volumes: list[dict[str, Any]]
    jobs: list[JobStatus]

    def typed_volumes(self) -> list[PrimaryStatus | BackupStatus]:
        """The volumes as what their role says."""
        return [volume_status(document) for document in self.volumes]


RecordType = TypeVar("RecordType", bound=Record)


def read(kind: type[RecordType], document: object) -> RecordType:
    """The typed value of a document."""
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as problem:
        raise FormatError(
            f"expected a {kind.__name__} document, found one that does not fit: {problem}; "
            "are both sides of the same version?"
        ) from problem


def volume_status(document: dict[str, Any]) -> PrimaryStatus | BackupStatus:
    """The status of a volume of either role."""
    if document.get("role") == "primary":
        return read(PrimaryStatus, document)
    return read(BackupStatus, document)


def merged(places: Sequence[Any], told: dict[str, Any]) -> MergeReport:
    """The report of the core, with the sources by name. Raises what made one of them fail."""
    for place, one in zip(places, told["sources"], strict=True):
        name = place[1] if isinstance(place, tuple) else getattr(place, "name", place)
        one["source"] = f"descriptor {name}" if isinstance(name, int) else str(name)
        one["error"] = None if one["error"] is None else error_document(one["error"])
    report = read(MergeReport, told)
    report.raise_failed()
    return report
