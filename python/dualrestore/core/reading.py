"""What a bundle holds, brought out of it: as an image, as extents, as bytes.

Guarantees: every byte was verified before it is seen (law 9); what is not included, damaged or was
never read is not zero (law 8). Bytes stay in the core's memory and are never copied into `bytes`.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

from dualrestore import _core
from dualrestore._core import BundleChunk, ByteBuffer, Trust
from dualrestore.core.places import (
    Descriptor,
    Known,
    Path,
    Progress,
    all_known,
    place_of,
)
from dualrestore.model import BundleExtent, ExtractReport, read


class ReadableBundle:
    """A bundle that has its end within reach: in a directory, or a tar in a file or on a disk.

    What is said of a bundle here is said of one medium. Offsets and lengths are bytes of the
    volume. An encrypted bundle is read by the key that it was opened with; one that was opened with
    `signers` gives nothing that was not signed.
    """

    path: str
    trust: Trust | None

    @cached_property
    def _reader(self) -> _core.BundleReader:
        return _core.BundleReader.open(self.path, self.trust)

    def extents(self) -> Iterator[BundleExtent]:
        """What the bundle holds: runs of `data` and of `zero`, ascending, joined where they touch.

        They are found out while they are asked for, from descriptors alone, so that memory is the
        same whatever the size. What was not included, could not be read when the bundle was made,
        or is described by a damaged page, is in none of them. Raises `DeviceError` if the medium
        cannot be read, `FormatError` if its descriptors do not ascend.

        >>> import pathlib, tempfile
        >>> from dualrestore import Bundle
        >>> place = tempfile.TemporaryDirectory()
        >>> image = pathlib.Path(place.name, "image")
        >>> image.write_bytes(b"x" * 65536 + bytes(131072))
        196608
        >>> bundle = Bundle.create(image, pathlib.Path(place.name, "out.drb"))
        >>> [tuple(extent) for extent in bundle.extents()]
        [(0, 65536, 'data'), (65536, 131072, 'zero')]
        >>> place.cleanup()
        """
        return (BundleExtent(*run) for run in self._reader.extents())

    def read(self, offset: int, length: int) -> ByteBuffer:
        """Bytes of the volume, verified: at most 1 GiB of any alignment, seen by `memoryview`.

        A range within one chunk shares the chunk's memory, and chunks that were read lately are
        kept, 16 MiB of them. Raises `UsageError` for what the bundle does not include,
        `IntegrityError` where it is damaged.

        >>> import pathlib, tempfile
        >>> from dualrestore import Bundle
        >>> place = tempfile.TemporaryDirectory()
        >>> image = pathlib.Path(place.name, "image")
        >>> image.write_bytes(b"abcd" * 16384)
        65536
        >>> bundle = Bundle.create(image, pathlib.Path(place.name, "out.drb"))
        >>> bytes(memoryview(bundle.read(4097, 6)))
        b'bcdabc'
        >>> place.cleanup()
        """
        return self._reader.read(offset, length)

    def chunks(self) -> Iterator[BundleChunk]:
        """All that has bytes, in the order in which it is stored, chunks that follow each other
        as one; runs of zeros have none and are told by `extents`.

        A chunk has its `offset` and at most 1 MiB, read-only, in the core's memory:
        `memoryview(chunk)`, and from there `numpy.frombuffer`. Each is read and verified when it is
        asked for. One that is damaged raises `IntegrityError`; `next` then goes on with the one
        after it.

        >>> import hashlib, pathlib, tempfile
        >>> from dualrestore import Bundle
        >>> place = tempfile.TemporaryDirectory()
        >>> image = pathlib.Path(place.name, "image")
        >>> image.write_bytes(bytes(65536) + b"x" * 65536)
        131072
        >>> bundle = Bundle.create(image, pathlib.Path(place.name, "out.drb"))
        >>> for chunk in bundle.chunks():
        ...     chunk.offset, len(chunk), hashlib.sha256(chunk).hexdigest()[:8]
        (65536, 65536, '1f8745f0')
        >>> place.cleanup()
        """
        return self._reader.chunks()

    def extract(
        self,
        destination: Path | Descriptor,
        *,
        format: str = "raw",  # noqa: A002 - the public name
        media: "Sequence[ReadableBundle]" = (),
        partial: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> ExtractReport:
        """Writes the volume out as a `raw` or `qcow2` image: into a new file, onto a disk, or
        through a descriptor from front to back. `media` are further media of the same bundle.

        A raw file is as sparse as the bundle. An existing file, or a disk that is not removable, is
        written over only by `force`. What the bundle does not include is refused (`UsageError`;
        `NextMediumError` if another medium has it) unless a `partial` image will do. Damaged chunks
        are left out: holes of a file, zeros of a stream, what a disk held before. The report tells
        of both; an image is the whole volume only if it is `whole`. A file that could not be
        finished is removed.

        >>> import pathlib, tempfile
        >>> from dualrestore import Bundle
        >>> place = tempfile.TemporaryDirectory()
        >>> image, copy = (pathlib.Path(place.name, name) for name in ("image", "copy"))
        >>> image.write_bytes(b"x" * 65536 + bytes(65536))
        131072
        >>> bundle = Bundle.create(image, pathlib.Path(place.name, "out.drb"))
        >>> report = bundle.extract(copy)
        >>> report.whole, report.bytes_data, copy.read_bytes() == image.read_bytes()
        (True, 65536, True)
        >>> place.cleanup()
        """
        known = [(one.path, one.trust) for one in (self, *media)]
        return extract_bundle(
            known, destination, format=format, partial=partial, force=force, progress=progress
        )


def extract_bundle(
    media: Sequence[Known],
    destination: Path | Descriptor,
    *,
    format: str = "raw",  # noqa: A002 - the public name
    partial: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ExtractReport:
    """As `Bundle.extract`, also of a tar that comes through a descriptor: then alone, and not as
    qcow2, which begins with where everything lies.
    """
    report = _core.bundle_extract(
        all_known(media),
        place_of(destination),
        format=format,
        force=force,
        partial=partial,
        progress=progress,
    )
    return read(ExtractReport, report)
