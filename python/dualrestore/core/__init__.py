"""The Rust core with Python's manners: typed reports, extents, context managers.

Guarantees: the only importer of `dualrestore._core`; long calls detach from the interpreter, call
`progress` about ten times a second and end when it raises (so Ctrl-C works).
Does not know: daemons, the command line.
"""

import pathlib
from collections.abc import Sequence
from functools import partial
from os import PathLike, fspath, major, minor
from stat import S_ISBLK
from typing import Any, Self
from uuid import uuid4

from dualrestore import _core
from dualrestore._core import (
    BackupVolume,
    BundleChunk,
    BundleKey,
    ByteBuffer,
    LinkConnection,
    LinkHub,
    NbdServer,
    NbdSource,
    PrimaryVolume,
    SnapshotSource,
    Trust,
    confine_writing,
    guard_secrets,
    renounce_system_calls,
)
from dualrestore.core.maps import OverwriteMap
from dualrestore.core.places import (
    Descriptor,
    Known,
    Path,
    Placed,
    Progress,
    is_stream,
    place_of,
)
from dualrestore.core.reading import ReadableBundle, extract_bundle
from dualrestore.errors import (
    LockedError,
    NextMediumError,
    UsageError,
)
from dualrestore.keys import WRAPPED_BYTES_MAX, Lock, Opener
from dualrestore.model import (
    BundleReport,
    BundleVerification,
    Disk,
    MergeReport,
    merged,
    read,
)

__all__ = [
    "BackupVolume",
    "Bundle",
    "BundleChunk",
    "BundleKey",
    "ByteBuffer",
    "Descriptor",
    "Encryption",
    "Known",
    "LinkConnection",
    "LinkHub",
    "NbdServer",
    "NbdSource",
    "OverwriteMap",
    "Path",
    "PrimaryVolume",
    "Progress",
    "SnapshotSource",
    "Trust",
    "confine_writing",
    "disk_behind",
    "extract_bundle",
    "guard_secrets",
    "is_stream",
    "locked_with",
    "merge",
    "merge_into_volume",
    "merge_revert",
    "renounce_system_calls",
    "show_bundle",
    "trusts_of",
    "verify_bundle",
    "write_bundle",
]

Encryption = tuple[BundleKey, bytes]
"""The key of a new bundle, and `key.age`."""

KEY_NAME = "key.age"


def locked_with(lock: Lock) -> Encryption:
    """A new key, wrapped for those who may open the bundle."""
    guard_secrets()
    key = BundleKey.generate(str(uuid4()))
    return key, lock.wrap(key.text())


def trusts_of(
    bundles: Sequence[Path | Descriptor],
    opener: Opener | None = None,
    signers: Path | None = None,
) -> list[Trust | None]:
    """What each bundle is to be held to: signatures checked, keys unwrapped.

    With `signers` an unsigned bundle is refused (`SignatureError`), with `opener` one that is not
    encrypted (`LockedError`). Media of one bundle, which wrap their key alike, cost one unwrapping.
    The key of a stream is unwrapped when it comes; its signature cannot be checked.
    """
    from dualrestore.signatures import signed_manifest

    if opener is None and signers is None:
        return [None] * len(bundles)
    manifests = [
        None if signers is None else signed_manifest(bundle, signers) for bundle in bundles
    ]
    if opener is None:
        return [Trust(manifest=manifest) for manifest in manifests]
    guard_secrets()
    keys: dict[bytes, BundleKey] = {}

    def unwrapped(wrapped: bytes, place: str) -> BundleKey:
        if wrapped not in keys:
            keys[wrapped] = BundleKey.parse(opener.unwrap(wrapped, place))
        return keys[wrapped]

    trusts: list[Trust | None] = []
    for bundle, manifest in zip(bundles, manifests, strict=True):
        if isinstance(bundle, int) or is_stream(bundle):
            trusts.append(Trust(unlock=partial(unwrapped, place=f"the stream's {KEY_NAME}")))
        else:
            place = str(pathlib.Path(bundle, KEY_NAME))
            trusts.append(Trust(unwrapped(_wrapped_key(bundle), place), manifest))
    return trusts


def _wrapped_key(bundle: Path) -> bytes:
    from dualrestore.signatures import read_member

    try:
        path = pathlib.Path(bundle)
        if path.is_dir():
            return read_member(path, KEY_NAME, WRAPPED_BYTES_MAX)
        wrapped = _core.tar_key(fspath(bundle))
    except FileNotFoundError:
        wrapped = None
    if wrapped is None:
        raise LockedError(
            f"{fspath(bundle)}: expected an encrypted bundle, found no {KEY_NAME}: it may have "
            "been exchanged; name no identity or passphrase if you trust it"
        )
    return wrapped


class Bundle(ReadableBundle):
    """The snapshot copy in its shippable form (paragraphs 54 and 60 of the seed): a directory of
    immutable segments and a manifest.

    >>> import pathlib, tempfile
    >>> place = tempfile.TemporaryDirectory()
    >>> image = pathlib.Path(place.name, "image")
    >>> image.write_bytes(bytes(1 << 20))
    1048576
    >>> Bundle.create(image, pathlib.Path(place.name, "out.drb")).verify().sound
    True
    >>> place.cleanup()
    """

    def __init__(
        self,
        path: Path,
        shown: dict[str, Any],
        report: BundleReport | None,
        trust: Trust | None = None,
    ) -> None:
        self.path = fspath(path)
        self.trust = trust
        """What it is held to: its key, its signature."""
        self.report = report
        """What `create` did; None for a bundle that was opened."""
        self._shown = shown

    @classmethod
    def create(
        cls,
        source: Path | SnapshotSource,
        destination: Path,
        selection: Sequence[tuple[int, int]] | None = None,
        *,
        media: Sequence[Path] = (),
        medium_size: int | None = None,
        partitions: Sequence[int] = (),
        allocated: bool = False,
        since: str | None = None,
        compression: str = "none",
        block_size: int = 4096,
        proceed: bool = False,
        state: Path | None = None,
        recipients: Sequence[str] = (),
        passphrase: str | None = None,
        encryption: Encryption | None = None,
        sign: Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Writes a bundle of an image or a snapshot; `selection` holds (offset, length).

        `destination` and then `media` are directories, each one medium, filled in this order;
        `medium_size` bounds the bytes on each. Raises `NextMediumError` when they are full before
        the bundle is complete. With `state`, a directory of this host, a later call may `proceed`
        with it, or after a crash, on the same medium or others, from the same unchanged source.

        `partitions` (by number) are selected too; `allocated` leaves out holes of the source;
        `since` names the snapshot of a cut that the backup remembers: only what changed from there
        to this snapshot is in the bundle, which is then merged before what it goes on from.

        `compression` is `none`, `auto`, `zstd` or `zstd:LEVEL`. With `recipients` (as age takes
        them) or a `passphrase` it is encrypted, its key wrapped in the format of age. `sign` is the
        file of an SSH key. Raises `UsageError` for what is no recipient or key.
        """
        lock = Lock.of(recipients, passphrase)
        if lock is not None:
            encryption = locked_with(lock)
        report = write_bundle(
            source,
            [destination, *media],
            selection,
            medium_size=medium_size,
            partitions=partitions,
            allocated=allocated,
            since=since,
            compression=compression,
            block_size=block_size,
            proceed=proceed,
            state=state,
            encryption=encryption,
            sign=sign,
            progress=progress,
        )
        if not report.complete:
            raise NextMediumError(
                f"media 1 to {report.media} of bundle {report.bundle} are written, "
                f"{report.bytes_left} bytes are left for a further one: proceed on another"
            )
        shown = _core.bundle_show(fspath(destination))
        trust = None if encryption is None else Trust(encryption[0])
        return cls(destination, shown, report, trust)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        identity: Path | None = None,
        passphrase: str | None = None,
        signers: Path | None = None,
    ) -> Self:
        """An existing bundle: a directory, or a tar in a file or on a disk. Raises `FormatError`
        if it is none or not complete.

        An encrypted one needs the file of an `identity`, or its `passphrase`, for everything but
        `show`; a wrong one raises `LockedError`. With `signers`, a file as `ssh-keygen` takes it, a
        bundle that none of them signed raises `SignatureError`.
        """
        if identity is not None or passphrase is not None:
            guard_secrets()
        [trust] = trusts_of([path], Opener.of(identity, passphrase), signers)
        return cls(path, _core.bundle_show(fspath(path)), None, trust)

    def show(self) -> dict[str, Any]:
        """What the manifest says: identity, geometry, extents, totals, segments."""
        return dict(self._shown)

    def verify(self, progress: Progress | None = None) -> BundleVerification:
        """Reads every chunk and checks it."""
        return read(
            BundleVerification, _core.bundle_verify(self.path, trust=self.trust, progress=progress)
        )

    def __repr__(self) -> str:
        return f"Bundle({self.path!r})"


def write_bundle(
    source: Path | SnapshotSource | NbdSource,
    media: Sequence[Path | Descriptor],
    selection: Sequence[tuple[int, int]] | None = None,
    *,
    medium_size: int | None = None,
    partitions: Sequence[int] = (),
    allocated: bool = False,
    since: str | None = None,
    compression: str = "none",
    block_size: int = 4096,
    proceed: bool = False,
    state: Path | None = None,
    encryption: Encryption | None = None,
    sign: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> BundleReport:
    """As `Bundle.create`, also into what cannot be read back.

    New directories take a bundle medium by medium; one that waits for a further medium is no error
    here. A new file named `.tar`, a disk, or a descriptor takes the same as a tar archive: its
    payloads lie at multiples of 4096 bytes, and 64 MiB of it are held in memory. Raises
    `DeviceError` with EPIPE if the reader of a pipe goes away. `force` allows a disk that is not
    removable, all of which is written over.
    """
    from dualrestore.signatures import check_signable, sign_finished

    if sign is not None:
        for medium in media:
            check_signable(medium, sign)
    name, mark = _known_as(source)
    report = _core.bundle_create(
        source if isinstance(source, SnapshotSource | NbdSource) else fspath(source),
        [place_of(medium) for medium in media],
        selection=selection,
        partitions=list(partitions),
        allocated=allocated,
        since=since,
        compression=compression,
        block_size=block_size,
        medium_size=medium_size,
        proceed=proceed,
        name=name,
        mark=mark,
        state=None if state is None else fspath(state),
        encryption=encryption,
        force=force,
        progress=progress,
    )
    if sign is not None:
        for medium in media:
            if not isinstance(medium, int):
                sign_finished(medium, sign)
    return read(BundleReport, report)


def _known_as(source: Path | SnapshotSource | NbdSource) -> tuple[str, str]:
    """What a source is called, and what differs once it has changed."""
    if isinstance(source, SnapshotSource):
        return f"snapshot {source.snapshot}", "a snapshot"
    if isinstance(source, NbdSource):
        return source.name, f"{source.size} bytes of {source.cut or 'an export'}"
    place = pathlib.Path(source).resolve()
    try:
        found = place.stat()
    except OSError as problem:
        raise UsageError(
            f"{fspath(source)}: expected an image to make a bundle of: {problem.strerror}"
        ) from problem
    if S_ISBLK(found.st_mode):
        return str(place), f"device {major(found.st_rdev)}:{minor(found.st_rdev)}"
    return str(place), f"{found.st_size} bytes, written {found.st_mtime_ns} ns after 1970"


def disk_behind(path: Path) -> Disk | None:
    """The disk that holds a path, or will if it is made; None if the kernel knows of none."""
    found = _core.disk_behind(fspath(path))
    return None if found is None else read(Disk, found)


def verify_bundle(
    source: Path | Descriptor | Bundle,
    progress: Progress | None = None,
    *,
    trust: Trust | None = None,
) -> BundleVerification:
    """As `Bundle.verify`, also of what can be read only once."""
    place, known = _known(source, trust)
    return read(BundleVerification, _core.bundle_verify(place, trust=known, progress=progress))


def show_bundle(source: Path | Descriptor) -> dict[str, Any]:
    """What the manifest says; a stream is read up to it."""
    return _core.bundle_show(place_of(source))


def _known(source: "Source", trust: Trust | None) -> tuple[Placed, Trust | None]:
    if isinstance(source, Bundle):
        return source.path, trust or source.trust
    return place_of(source), trust


Source = Path | Descriptor | Bundle | NbdSource
"""A bundle (a directory, a tar, one that was opened), a raw image, or what a server exports."""


def merge(
    source: Source | Sequence[Source | Known],
    target: Path,
    map: OverwriteMap,  # noqa: A002 - the public name
    progress: Progress | None = None,
    *,
    trust: Trust | None = None,
    engine: str = "auto",
    undo: Path | None = None,
    dry_run: bool = False,
) -> MergeReport:
    """Writes what is missing in a file or device, and only that, from bundles or raw images.

    The method's step 246: a block is written only if the map says that it is not current. Every
    chunk is verified before its blocks are written. May be interrupted and repeated. An encrypted
    bundle is given as `Bundle.open(path, identity=..)`.

    Of several sources those on different disks are read side by side; what is damaged in one comes
    from another. Where some fail the others are merged whole; then the error of the first is
    raised, with a `report` of what was done.

    `engine` is `io_uring`, `threads`, or `auto` for the one that suits. `undo` is a file that keeps
    what is overwritten, for `merge_revert`. With `dry_run` nothing is written, and no chunk is
    read: the report says what would be.
    """
    known = _all_known(source, trust)
    report = _core.merge(
        known,
        fspath(target),
        map.inner,
        engine=engine,
        undo=None if undo is None else fspath(undo),
        dry_run=dry_run,
        progress=progress,
    )
    return merged([place for place, _ in known], report)


def _all_known(
    source: Source | Sequence[Source | Known], trust: Trust | None
) -> list[tuple[Placed, Trust | None]]:
    if isinstance(source, str | int | PathLike | Bundle | NbdSource):
        return [_known(source, trust)]
    return [_known(*one) if isinstance(one, tuple) else _known(one, trust) for one in source]


def merge_revert(undo: Path, target: Path, map: OverwriteMap) -> int:  # noqa: A002 - as above
    """Puts back what merges with that `undo` overwrote, which is missing again; returns the bytes.
    What else was written to the target since is lost there.
    """
    return _core.merge_revert(fspath(undo), fspath(target), map.inner)


def merge_into_volume(
    source: Source | Sequence[Source | Known],
    volume: PrimaryVolume,
    progress: Progress | None = None,
    *,
    trust: Trust | None = None,
    engine: str = "auto",
) -> MergeReport:
    """The same into a volume that is being served, under its live I/O."""
    known = _all_known(source, trust)
    report = _core.merge_into_volume(known, volume, engine=engine, progress=progress)
    return merged([place for place, _ in known], report)
