"""The Rust core with Python's manners: typed reports, extents, context managers.

Guarantees: the only importer of `dualrestore._core`; long calls detach from the interpreter, call
`progress` about ten times a second and end when it raises (so Ctrl-C works).
Does not know: daemons, the command line.
"""

from collections.abc import Callable, Iterator, Sequence
from os import PathLike, fspath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from dualrestore import _core
from dualrestore._core import (
    BackupVolume,
    ByteBuffer,
    LinkConnection,
    LinkHub,
    NbdServer,
    PrimaryVolume,
    SnapshotSource,
)
from dualrestore.model import BundleReport, BundleVerification, Extent, MergeReport, read

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

__all__ = [
    "BackupVolume",
    "Bundle",
    "ByteBuffer",
    "LinkConnection",
    "LinkHub",
    "NbdServer",
    "OverwriteMap",
    "PrimaryVolume",
    "SnapshotSource",
    "check_merge",
    "check_merge_into_volume",
    "merge",
    "merge_into_volume",
    "show_bundle",
    "verify_bundle",
    "write_bundle",
]

Path = str | PathLike[str]
Descriptor = int
"""Of a pipe, socket, file or disk that a bundle goes through as a tar, from front to back."""
Progress = Callable[[dict[str, int]], None]


class OverwriteMap:
    """Which blocks of a volume are current, in a file that survives a crash (paragraphs 48 to 51
    of the seed). A context manager; the file is locked while it is open.

    Offsets, lengths and sizes are bytes. Raises `UsageError` for ranges that are outside the volume
    or not aligned to blocks, `FormatError` and `IntegrityError` for files that are no sound map.

    >>> import pathlib, tempfile
    >>> place = tempfile.TemporaryDirectory()
    >>> path = pathlib.Path(place.name, "over.map")
    >>> with OverwriteMap.create(path, size=1 << 20, block_size=4096) as m:
    ...     m.mark_current(4096, 8192)
    ...     m.current_bytes, m.is_current(8192, 4096), list(m.current_extents())
    8192
    (8192, True, [Extent(offset=4096, length=8192)])
    >>> place.cleanup()
    """

    def __init__(self, inner: _core.OverwriteMap) -> None:
        self._inner = inner

    @classmethod
    def create(
        cls,
        path: Path,
        size: int,
        block_size: int = 4096,
        *,
        volume: str | None = None,
        generation: int = 1,
    ) -> Self:
        """A new map file in which everything is missing, durable on return.

        Without `volume` the map is bound to none: the first bundle of a volume that is merged while
        nothing is current binds it to that volume and generation.
        """
        return cls(_core.OverwriteMap.create(fspath(path), size, block_size, volume, generation))

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing map file."""
        return cls(_core.OverwriteMap.open(fspath(path)))

    @property
    def inner(self) -> _core.OverwriteMap:
        """The core's own object."""
        return self._inner

    @property
    def path(self) -> str:
        """The file."""
        return fspath(self._inner.path)

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        return self._inner.size

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._inner.block_size

    @property
    def generation(self) -> int:
        """The life of the volume that the map belongs to."""
        return self._inner.generation

    @property
    def volume(self) -> str | None:
        """The UUID of the volume; None while the map is bound to none (see `create`)."""
        return self._inner.volume

    @property
    def current_bytes(self) -> int:
        """Bytes that are current."""
        return self._inner.current_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that are missing."""
        return self._inner.missing_bytes

    def mark_current(self, offset: int, length: int) -> int:
        """Marks whole blocks current; returns the bytes that were not before."""
        return self._inner.mark_current(offset, length)

    def is_current(self, offset: int, length: int) -> bool:
        """Whether every block that the range touches is current."""
        return self._inner.is_current(offset, length)

    def current_extents(self) -> Iterator[Extent]:
        """Runs of current bytes, ascending."""
        return (Extent(*run) for run in self._inner.current_extents())

    def missing_extents(self) -> Iterator[Extent]:
        """Runs of missing bytes, ascending."""
        return (Extent(*run) for run in self._inner.missing_extents())

    def picture(self, cells: int) -> list[int]:
        """Current bytes of each of `cells` equal stretches, in order."""
        return self._inner.picture(cells)

    def to_numpy(self) -> "NDArray[numpy.bool_]":
        """One bool a block, as at this moment; shape `(blocks,)`."""
        import numpy

        blocks = -(-self.size // self.block_size)
        packed = numpy.frombuffer(memoryview(self._inner.bits()), dtype=numpy.uint8)
        bits = numpy.unpackbits(packed, count=blocks, bitorder="little")
        return bits.view(numpy.bool_)

    def commit(self) -> None:
        """Makes every mark durable."""
        self._inner.commit()

    def close(self) -> None:
        """Commits and gives the file's lock back."""
        self._inner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OverwriteMap({self.path!r})"


class Bundle:
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

    def __init__(self, path: Path, shown: dict[str, Any], report: BundleReport | None) -> None:
        self.path = fspath(path)
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
        compression: Literal["none", "zstd"] = "none",
        level: int = 1,
        block_size: int = 4096,
        progress: Progress | None = None,
    ) -> Self:
        """Writes a bundle of an image or a snapshot; `selection` holds (offset, length)."""
        report = write_bundle(
            source,
            destination,
            selection,
            compression=compression,
            level=level,
            block_size=block_size,
            progress=progress,
        )
        return cls(destination, _core.bundle_show(fspath(destination)), report)

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing bundle: a directory, or a tar in a file or on a disk. Raises `FormatError`
        if it is none or not complete."""
        return cls(path, _core.bundle_show(fspath(path)), None)

    def show(self) -> dict[str, Any]:
        """What the manifest says: identity, geometry, extents, totals, segments."""
        return dict(self._shown)

    def verify(self, progress: Progress | None = None) -> BundleVerification:
        """Reads every chunk and checks it."""
        return read(BundleVerification, _core.bundle_verify(self.path, progress=progress))

    def __repr__(self) -> str:
        return f"Bundle({self.path!r})"


def write_bundle(
    source: Path | SnapshotSource,
    destination: Path | Descriptor,
    selection: Sequence[tuple[int, int]] | None = None,
    *,
    compression: Literal["none", "zstd"] = "none",
    level: int = 1,
    block_size: int = 4096,
    progress: Progress | None = None,
) -> BundleReport:
    """As `Bundle.create`, also into what cannot be read back.

    A new directory takes a bundle directory. A new file named `.tar`, a disk, or a descriptor takes
    the same as a tar archive: its payloads lie at multiples of 4096 bytes, and 64 MiB of it are
    held in memory. Raises `DeviceError` with EPIPE if the reader of a pipe goes away.
    """
    report = _core.bundle_create(
        source if isinstance(source, SnapshotSource) else fspath(source),
        _place(destination),
        selection=selection,
        compression=compression,
        level=level,
        block_size=block_size,
        progress=progress,
    )
    return read(BundleReport, report)


def verify_bundle(
    source: Path | Descriptor | Bundle, progress: Progress | None = None
) -> BundleVerification:
    """As `Bundle.verify`, also of what can be read only once."""
    return read(BundleVerification, _core.bundle_verify(_place(source), progress=progress))


def show_bundle(source: Path | Descriptor) -> dict[str, Any]:
    """What the manifest says; a stream is read up to it."""
    return _core.bundle_show(_place(source))


def _place(place: Path | Descriptor | Bundle) -> str | int:
    if isinstance(place, Bundle):
        return place.path
    return place if isinstance(place, int) else fspath(place)


def merge(
    source: Path | Descriptor | Bundle,
    target: Path,
    map: OverwriteMap,  # noqa: A002 - the public name
    progress: Progress | None = None,
) -> MergeReport:
    """Writes what is missing in a file or device, and only that, from a bundle or raw image.

    The method's step 246: a block is written only if the map says that it is not current. Every
    chunk is verified before its blocks are written. May be interrupted and repeated. A descriptor
    gives a bundle as a tar, from front to back; one that ends early leaves its report's
    `shortfall`.
    """
    place = _place(source)
    return read(MergeReport, _core.merge(place, fspath(target), map.inner, progress=progress))


def check_merge(sources: Sequence[Path], target: Path, overwrite_map: OverwriteMap) -> None:
    """Raises what `merge` of any of the sources would raise before its first byte."""
    _core.merge_check([fspath(source) for source in sources], fspath(target), overwrite_map.inner)


def check_merge_into_volume(sources: Sequence[Path], volume: PrimaryVolume) -> None:
    """The same for `merge_into_volume`."""
    _core.merge_check_volume([fspath(source) for source in sources], volume)


def merge_into_volume(
    source: Path | Descriptor | Bundle, volume: PrimaryVolume, progress: Progress | None = None
) -> MergeReport:
    """The same into a volume that is being served, under its live I/O."""
    return read(MergeReport, _core.merge_into_volume(_place(source), volume, progress=progress))
