"""Overwrite maps with Python's manners."""

from collections.abc import Iterator
from os import fspath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dualrestore import _core
from dualrestore.core.places import Path
from dualrestore.model import Extent

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray


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
