"""The Rust core as Python sees it. Only `dualrestore.core` imports it.

Common to everything here:

* Offsets, lengths and sizes are bytes. Paths are `str`. UUIDs are `str` with hyphens.
* Every object may be used from several threads at once. A call that can wait for a disk, the link
  or a lock detaches from the interpreter; `close` may be called twice.
* Reports and statuses are plain `dict`s of numbers, strings, lists and dicts, as drawn in the
  docstrings; `dualrestore.model` gives them types. Further keys may appear at any time.
* Errors are raised as the classes of `dualrestore.errors`:
  `UsageError(message)`, `FormatError(message)`, `IntegrityError(message)`,
  `IdentityError(message)`, `DeviceError(errno, message)`, `LinkError(message)`,
  `BusyError(message)`, `PoisonedError(errno, message)`, `DeadlineError(message)`,
  `InterruptedJobError(message)`.
* `progress` is called from the calling thread about ten times a second and once at the end; an
  exception that it raises ends the job at the next safe point and is raised to the caller.
  Signals are polled at the same places.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, Literal, TypeAlias, final

from typing_extensions import Buffer

__all__ = [
    "BackupVolume",
    "BundleChunk",
    "BundleChunkIterator",
    "BundleExtents",
    "BundleKey",
    "BundleReader",
    "ByteBuffer",
    "LinkConnection",
    "LinkHub",
    "NbdServer",
    "NbdSource",
    "OverwriteMap",
    "PrimaryVolume",
    "SnapshotSource",
    "Trust",
    "bundle_create",
    "bundle_extract",
    "bundle_show",
    "bundle_verify",
    "confine_writing",
    "disk_behind",
    "guard_secrets",
    "merge",
    "merge_into_volume",
    "merge_revert",
    "renounce_system_calls",
    "tar_key",
]

_Range: TypeAlias = tuple[int, int]
"""(offset, length)"""

_Place: TypeAlias = str | int | tuple[int, str] | NbdSource
"""A path, a descriptor that a tar goes through from front to back (and its name), or an export."""

_Progress: TypeAlias = Callable[[dict[str, int]], None]
"""Receives at least `done_bytes` and `total_bytes`; the rest are the counters of the report."""

_LinkClass: TypeAlias = Literal["demand", "mirror", "bulk"]

@final
class ByteBuffer(Buffer):
    """Bytes that Rust owns, seen through the read-only buffer protocol: `memoryview(buffer)`."""

    def __len__(self) -> int: ...

@final
class BundleChunk(Buffer):
    """A verified chunk of a bundle, as a `ByteBuffer`, and where in the volume it lies."""

    @property
    def offset(self) -> int: ...
    def __len__(self) -> int: ...

@final
class BundleChunkIterator:
    """Chunks of a bundle that have bytes. After an error it goes on with the next one."""

    def __iter__(self) -> BundleChunkIterator: ...
    def __next__(self) -> BundleChunk: ...

@final
class BundleExtents:
    """Runs that a bundle holds, ascending: offset, length, kind."""

    def __iter__(self) -> BundleExtents: ...
    def __next__(self) -> tuple[int, int, Literal["data", "zero"]]: ...

@final
class BundleReader:
    """A bundle in a directory or a tar, open for reading: every byte is verified."""

    @staticmethod
    def open(path: str, trust: Trust | None = None) -> BundleReader: ...
    def read(self, offset: int, length: int) -> ByteBuffer:
        """At most 1 GiB. What is not included is a `UsageError`, damage an `IntegrityError`."""

    def extents(self) -> BundleExtents: ...
    def chunks(self) -> BundleChunkIterator: ...

@final
class OverwriteMap:
    """A map file: which blocks of a volume are current. The file is locked while open."""

    @staticmethod
    def create(
        path: str,
        size: int,
        block_size: int,
        volume: str | None = None,
        generation: int | None = None,
    ) -> OverwriteMap:
        """A new file, durable on return; everything missing. Without `volume` it is bound to none.

        An existing file is refused (`UsageError`)."""

    @staticmethod
    def open(path: str) -> OverwriteMap: ...
    @property
    def path(self) -> PurePath: ...
    @property
    def size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def volume(self) -> str | None: ...
    @property
    def current_bytes(self) -> int: ...
    @property
    def missing_bytes(self) -> int: ...
    def mark_current(self, offset: int, length: int) -> int:
        """Block-aligned (the end of the volume counts as aligned). Returns the bytes changed.
        Durable after `commit` or `close`."""

    def is_current(self, offset: int, length: int) -> bool:
        """Whether every block touched by the range is current."""

    def current_extents(self) -> Iterator[_Range]: ...
    def missing_extents(self) -> Iterator[_Range]: ...
    def bits(self) -> ByteBuffer:
        """A copy at one moment: one bit a block, least significant first, 1 = current."""

    def picture(self, cells: int) -> list[int]:
        """Current bytes of each of `cells` equal stretches of the volume, in order."""

    def commit(self) -> None: ...
    def close(self) -> None:
        """Commits and gives the lock back. Any other use afterwards is a `UsageError`."""

@final
class SnapshotSource:
    """A snapshot of a backup volume as the source of a bundle. Keeps it from deletion."""

    @property
    def snapshot(self) -> str: ...

@final
class NbdSource:
    """An export of an NBD server, open for reading, by threads at once over one connection."""

    def __new__(
        cls, descriptor: int, export: str, name: str, *, greeted: bool = False
    ) -> NbdSource:
        """Takes ownership of a connected stream socket, and speaks the handshake. `greeted`:
        greeting and flags were said, and what follows is in TLS. `name` is for messages."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def cut(self) -> dict[str, Any] | None:
        """`{volume, generation, sequence, snapshot}` of a snapshot that a dualrestore backup
        exports; None of any other export."""

    def close(self) -> None:
        """Ends reads that wait, and closes the connection."""

@final
class BundleKey:
    """The key of an encrypted bundle. Stays in the core, and is wiped when the object goes.

    From the first one on the process writes no core dump, until it ends."""

    @staticmethod
    def generate(bundle: str) -> BundleKey:
        """A random key for the bundle of that UUID."""

    @staticmethod
    def parse(text: bytes) -> BundleKey:
        """Reads what `key.age` wraps. Raises `LockedError`, which does not repeat the text."""

    @property
    def bundle(self) -> str: ...
    def text(self) -> bytes:
        """The line that `key.age` wraps. A copy that Python cannot wipe: let go of it soon."""

@final
class Trust:
    """What a bundle is held to: its key, the SHA-256 of the manifest whose signature was checked.

    A bundle that does not fit raises `LockedError` or `IntegrityError` when it is opened."""

    def __new__(
        cls,
        key: BundleKey | None = None,
        manifest: bytes | None = None,
        unlock: Callable[[bytes], BundleKey] | None = None,
    ) -> Trust:
        """`unlock` makes the key of a stream from its `key.age`, once that has come."""

    @property
    def key(self) -> BundleKey | None: ...
    @property
    def manifest(self) -> bytes | None: ...

def confine_writing(places: Sequence[str]) -> None:
    """From now on this thread, and all that it starts, writes below these places only."""

def renounce_system_calls() -> None:
    """From now on the process runs no program, mounts nothing and traces nobody."""

def guard_secrets() -> None:
    """From now on the process writes no core dump, and others of its user cannot look into it."""

def bundle_create(
    source: str | SnapshotSource | NbdSource,
    media: Sequence[_Place],
    *,
    selection: Sequence[_Range] | None = None,
    partitions: Sequence[int] | None = None,
    allocated: bool = False,
    since: str | None = None,
    compression: str = "none",
    block_size: int = 4096,
    medium_size: int | None = None,
    proceed: bool = False,
    name: str = "",
    mark: str = "",
    state: str | None = None,
    encryption: tuple[BundleKey, bytes] | None = None,
    force: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Writes a bundle of an image or a snapshot over directories, one a medium, or as one tar (new
    file, disk, pipe).

    `{bundle, volume, generation, bytes_selected, bytes_data, bytes_zero, bytes_stored,
    bytes_saved, chunks, chunks_compressed, chunks_untried, encrypted, segments, media, bytes_left,
    seconds}`. A directory must not exist or be empty. `bytes_left`: of the selection, waiting for a
    further medium. `state`: a directory for the record with which a later call may `proceed`, if
    the source's `name` and `mark` are the same. `since`: the snapshot of a cut, to hold only what
    changed from there; `allocated`: leaves holes out. `encryption`: the key, whose bundle this
    becomes, and `key.age`. `force`: also onto a disk that is not removable. `compression`:
    `auto`, `none`, `zstd` or `zstd:LEVEL`."""

def bundle_show(place: _Place) -> dict[str, Any]:
    """`{bundle, volume, size, block_size, generation, sequence, snapshot, created, compression,
    encrypted, complete, allocated_only, base, medium, last, extents: [[offset, length], ..],
    bytes_selected, bytes_data, bytes_zero, bytes_stored, chunks, segments: [{name, bytes, chunks},
    ..]}`"""

def tar_key(path: str) -> bytes | None:
    """`key.age` of a tar in a file or on a disk; None of anything else."""

def bundle_verify(
    place: _Place, *, trust: Trust | None = None, progress: _Progress | None = None
) -> dict[str, Any]:
    """Reads every chunk. Damage is reported, not raised.

    `{bytes_checked, chunks_checked, chunks_damaged, segments_missing, damaged: [[offset, length],
    ..] (at most 1000), problems: [text, ..] (at most 100), seconds}`"""

def bundle_extract(
    media: Sequence[tuple[_Place, Trust | None]],
    destination: _Place,
    *,
    format: str = "raw",
    force: bool = False,
    partial: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Writes an image of the volume, `raw` or `qcow2`, of media of one bundle in any order, or of
    one stream of it (raw only).

    `{size, bytes_data, bytes_zero, bytes_damaged, bytes_absent, bytes_output, chunks_total,
    chunks_damaged, damaged: [[offset, length], ..], absent: [[offset, length], ..], shortfall,
    seconds}`. `force`: also over a file that exists, or a disk that is not removable. `partial`:
    also if a part of the volume is not there (else `UsageError`, or `NextMediumError` where
    another medium has it)."""

def disk_behind(path: str) -> dict[str, Any] | None:
    """`{device, model, serial, size, removable}` of the disk that holds a path, or will; None: it
    is none, or the kernel does not say."""

def merge(
    sources: Sequence[tuple[_Place, Trust | None]],
    target: str,
    map: OverwriteMap,
    *,
    engine: str = "auto",
    undo: str | None = None,
    dry_run: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Merges bundles or raw images into a file or device that nobody serves. Those on different
    disks are read side by side. None is where one may not be.

    `{bytes_written, bytes_skipped, bytes_zeroed, bytes_fetched, bytes_in_doubt, bytes_stale,
    chunks_repaired, chunks_damaged, bytes_total, bytes_read, shortfall, seconds, engine,
    side_by_side, sources: [{bytes_total, bytes_written, bytes_read, chunks_total, chunks_repaired,
    chunks_damaged, damaged: [[offset, length], ..], shortfall, error}, ..]}`. `bytes_skipped`: of
    the selection, because they were current. A damaged chunk that no source has whole stays missing
    and is counted. `bytes_in_doubt`: missing, and after a crash only the link may supply them.
    `error`: the exception for which a source was given up; the others were merged. `engine`:
    `auto`, `io_uring` or `threads`. `undo`: a file that keeps what is overwritten. `dry_run`:
    nothing is read of the chunks nor written; the report says what would be."""

def merge_revert(undo: str, target: str, map: OverwriteMap) -> int:
    """Puts back what merges with that `undo` overwrote; its blocks are missing again. Bytes."""

def merge_into_volume(
    sources: Sequence[tuple[_Place, Trust | None]],
    volume: PrimaryVolume,
    *,
    engine: str = "auto",
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """The same into a live volume, under its claims. Damaged chunks are fetched over the link when
    it is up (`chunks_repaired`), else left missing (`chunks_damaged`); so are blocks that are in
    doubt after a crash (`bytes_fetched`, `bytes_in_doubt`)."""

@final
class PrimaryVolume:
    """A volume in the role primary: its device, map, hot extents and threads."""

    @staticmethod
    def open(
        state_directory: str,
        name: str,
        device: str,
        *,
        size: int | None,
        block_size: int,
        mirror: Literal["flush", "write", "async"],
        backups: int,
        missing_deadline_ms: int,
        direct: bool = False,
        strict: bool = False,
        async_bytes: int | None = None,
        async_ms: int | None = None,
    ) -> PrimaryVolume:
        """`backups`: how many there are. A missing file is created sparse when `size` is given.
        `missing_deadline_ms`: how long a read of a missing block waits for a link that is down.
        `strict`: a flush also commits the map. `async_bytes`, `async_ms`: how far the backup may
        lag under `mirror="async"` while the link is up (64 MiB and 5 s unless told); writes wait
        before it lags further. Files of the volume live in `state_directory` (made by the caller,
        one per volume)."""

    @property
    def name(self) -> str: ...
    def status(self) -> dict[str, Any]:
        """`{state, volume, size, block_size, generation, current_bytes, missing_bytes,
        link_only_bytes, unsent_bytes, hot_extents, hydrating, mirrored, error,
        backups: [{connected, demand, mirror, bulk (states of the link classes), unsent_bytes,
        resyncing, in_flight_bytes, lag_bytes, lag_ms (of writes since it was connected, what is
        not durable there, and for how long), error}, ..],
        media: as `attach` returns them,
        reads, writes, flushes, bytes_read, bytes_written_live, fetches, bytes_fetched,
        bytes_hydrated, bytes_merged, bytes_from_media, bytes_skipped_current, bytes_resent,
        bytes_found_equal (unsent, and not sent since the backup held them), errors}`

        `state`: `waiting` (for the operator's word), `restoring` (something is missing),
        `resyncing` (nothing missing, what the backup lacks is being sent), `mirroring` (only
        writes in flight), `mirrored`, `current` (there is no backup), `degraded` (a backup is not
        connected), `failed` (poisoned). `mirrored` is law 10. Counters begin at the opening."""

    def restore(self, lost: Sequence[_Range] | Literal["all", "none"]) -> dict[str, Any]:
        """The operator's word: declares what is lost, durable on return, with a new generation.
        `{generation, missing_bytes}`. `none` on a waiting volume: the primary is the truth and
        everything is unsent. The link connections are closed and must be made again."""

    def attach(self, bundle: str, *, key: BundleKey | None = None) -> dict[str, Any]:
        """Missing blocks are read from the bundle in this directory (an absolute path) too, ahead
        of the link, until it is detached or a loss is declared; a restart does not forget it.
        Attached again, it is opened anew. The key of an encrypted one is not remembered: after a
        restart it is `refused` until it is attached again.

        `{path, state, error, bundle, generation, sequence, bytes_covered, bytes_supplied,
        reads_damaged}`; `state` is `opening` (after a start), `attached`, `unvouched` (of an
        earlier generation, and the backup has not said what it may supply), `gone` (pulled out,
        stalled or unreadable: attach it again) or `refused` (after a start: see `error`)."""

    def detach(self, bundle: str) -> bool:
        """Nothing is read from this directory any more; False if it was not attached."""

    def hydrate(self, enabled: bool) -> None:
        """Fetch missing blocks over the bulk connection in the background (until told else)."""

    def snapshot(
        self,
        label: str,
        *,
        selection: Sequence[_Range] | None = None,
        backup: int = 0,
        timeout_ms: int,
    ) -> dict[str, Any]:
        """An in-stream cut at the backup, durable there on return.
        `{snapshot, label, generation, sequence, created, selection: [[offset, length], ..]}`"""

    def compare(
        self, offset: int, length: int, *, backup: int = 0, timeout_ms: int
    ) -> dict[str, Any]:
        """Digests of both sides of one range, at most 16 MiB.

        `{state, compared_bytes, missing_bytes, different: [[offset, length], ..]}`; `state` is
        `same`, `different`, or `busy`: a write, fetch, merge or resend touched the range meanwhile
        or is pending, so nothing can be said; ask again. Missing blocks are not compared."""

    def repair(self, ranges: Sequence[_Range], *, backup: int = 0) -> int:
        """Marks the current blocks of the ranges unsent, so that they are sent again."""

    def flush(self) -> None:
        """As a flush of an application: devices, and the backup by policy."""

    def commit(self) -> None:
        """Makes the map durable now instead of within a second."""

    def map_extents(
        self, plane: Literal["current", "missing", "unsent", "link_only"]
    ) -> list[_Range]: ...
    def picture(self, cells: int) -> list[int]: ...
    def close(self) -> None:
        """Refuses new requests, lets those in flight end, flushes, commits, marks a clean stop."""

@final
class BackupVolume:
    """A volume in the role backup: mirror device, changed map, snapshots."""

    @staticmethod
    def open(
        state_directory: str,
        name: str,
        device: str,
        *,
        size: int | None,
        block_size: int,
        direct: bool = False,
    ) -> BackupVolume: ...
    @property
    def name(self) -> str: ...
    def status(self) -> dict[str, Any]:
        """`{state, volume, size, block_size, generation, changed_bytes, connected, error,
        links: {demand, mirror, bulk}, primary (text), reads, writes, flushes, bytes_sent,
        bytes_mirrored, bytes_preserved, snapshots: [as in snapshots()]}`, and as `preservation()`.

        `state`: `empty` (never met its primary), `idle` (not connected), `mirroring`, `failed`."""

    def snapshot(self, label: str, *, selection: Sequence[_Range] | None = None) -> dict[str, Any]:
        """A cut without the primary, for when it does not run (`BusyError` while connected)."""

    def snapshots(self) -> list[dict[str, Any]]:
        """`[{snapshot, label, generation, sequence, created, size, preserved_bytes, released_bytes,
        broken, selection}, ..]`, oldest first."""

    def delete_snapshot(self, snapshot: str) -> None: ...
    def preservation(self) -> dict[str, Any]:
        """`{store_free_bytes, store_total_bytes, store_low, snapshots_broken: {snapshot: why}}`:
        None for bytes that the file system does not tell. Cheap, to be asked often."""

    def source(self, snapshot: str, *, release: str = "auto") -> SnapshotSource:
        """`release`: when what a bundle holds durably is given back, `never`, `always`, or `auto`:
        when its store is full and the snapshot would break otherwise."""

    def digest(self, offset: int, length: int) -> str: ...
    def close(self) -> None: ...

@final
class LinkHub:
    """All link connections of this process, and what they lead to."""

    def __new__(cls) -> LinkHub: ...
    @property
    def wake_descriptor(self) -> int:
        """Becomes readable when a connection has outgoing bytes or must be closed. Owned here."""

    def ready(self) -> list[int]:
        """The ids of those connections; clears the descriptor."""

    def serve(self, volume: BackupVolume) -> None:
        """Lets accepted connections lead to this volume."""

    def withdraw(self, volume: BackupVolume) -> None: ...
    def connect(
        self, volume: PrimaryVolume, backup: int, remote_name: str, link_class: _LinkClass
    ) -> LinkConnection:
        """The client side: speaks first."""

    def accept(self) -> LinkConnection:
        """The server side: volume and class come with the hello."""

    def disconnect(self, volume: PrimaryVolume) -> None:
        """Ends the connections of a primary; they are to be made again."""

    def close(self) -> None: ...

@final
class LinkConnection:
    """The protocol of one TCP connection, without the socket."""

    @property
    def id(self) -> int: ...
    @property
    def state(self) -> Literal["handshake", "active", "closed", "failed"]: ...
    @property
    def error(self) -> str | None:
        """Why it failed, in words for the operator."""

    @property
    def refused(self) -> bool:
        """Failed because the peer is the wrong one (volume, role, geometry, generation, version):
        trying again soon is useless."""

    @property
    def label(self) -> str:
        """Volume and class, once known: `v demand`."""

    def receive(self, buffer: bytearray | memoryview, length: int) -> None:
        """The first `length` bytes of the buffer came from the peer; they are copied or used
        before it returns. After a protocol error the state is `failed`; nothing is raised."""

    def take_outgoing(self, limit: int) -> ByteBuffer | None:
        """At most about `limit` bytes (whole frames), or None."""

    def tick(self) -> float:
        """Heartbeats and silence. Returns the seconds until it wants to be called again."""

    def close(self) -> None:
        """The socket is gone: the volume learns that this link class is down."""

@final
class NbdServer:
    """NBD sessions over descriptors that Python accepted. Guest I/O runs in Rust threads only."""

    def __new__(cls, tls: tuple[bytes, bytes, bytes] | None = None) -> NbdServer:
        """`tls`: authority, certificate and key, as PEM: nothing is served but over TLS 1.3 with
        a certificate of that authority from the client. Without it, in the clear."""

    def add_volume(
        self, name: str, volume: PrimaryVolume, allowed: list[str] | None = None
    ) -> None:
        """Read-write export. While the volume waits for the operator's word it is refused.
        `allowed`: names of certificates, or their fingerprints (`sha256:..`): for everybody else
        it does not exist."""

    def add_snapshot(
        self, name: str, volume: BackupVolume, snapshot: str, allowed: list[str] | None = None
    ) -> None:
        """Read-only export, named by convention `NAME@SNAPSHOT`."""

    def remove(self, name: str) -> None:
        """Its sessions are ended."""

    def exports(self) -> list[str]: ...
    def serve(self, descriptor: int, peer: str) -> None:
        """Takes ownership of a connected stream socket. `BusyError` (and the descriptor is
        closed) when too many are open."""

    def connections(self) -> list[dict[str, Any]]:
        """`[{peer, requests, bytes_read, bytes_written, in_flight}, ..]`"""

    def shutdown(self, timeout_ms: int) -> bool:
        """Ends all sessions after the requests in flight; whether all ended in time."""
