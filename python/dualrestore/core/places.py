"""Places of bundles and images, as the core takes them."""

import pathlib
from collections.abc import Callable, Sequence
from os import PathLike, fspath

from dualrestore._core import NbdSource, Trust
from dualrestore.model import Stream

Path = str | PathLike[str]
Descriptor = int
"""Of a pipe, socket, file or disk that a bundle goes through as a tar, or an image, from front to
back."""
Progress = Callable[[dict[str, int]], None]
Known = tuple[Path | Descriptor | NbdSource, Trust | None]
"""A source, and what it is held to."""


def is_stream(place: Path | Descriptor) -> bool:
    """Whether it can be read only once, from front to back."""
    if isinstance(place, int):
        return True
    path = pathlib.Path(place)
    return path.is_fifo() or path.is_socket() or path.is_char_device()


Placed = str | int | tuple[int, str] | NbdSource
"""In the core's types: a path, a descriptor, one with its name, an export."""


def place_of(place: Path | Descriptor | NbdSource) -> Placed:
    """In the core's types."""
    if isinstance(place, Stream):
        return int(place), place.name
    return place if isinstance(place, int | NbdSource) else fspath(place)


def all_known(sources: Sequence[Known]) -> list[tuple[Placed, Trust | None]]:
    """The same of sources."""
    return [(place_of(place), trust) for place, trust in sources]
