"""Words for quantities: sizes, ranges, rates and durations, read from and written for people.

Guarantees: what `format_size(..., exact=True)` writes, `parse_size` reads back. Decimal suffixes
(kB, MB) are refused: whether they mean 1000 or 1024 is a guess. Does not know: volumes.
"""

import re
from collections.abc import Iterable

from dualrestore.errors import UsageError

SIZE_MAX = 2**63 - 512
"""Largest volume, as in the core."""
SHOWN_CHARACTERS = 60
"""Of a word that is no quantity."""

_SIZE_SUFFIXES = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SHORT_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_RATE_SUFFIXES = {"bit": 1, "kbit": 10**3, "Mbit": 10**6, "Gbit": 10**9}
_DURATION_SUFFIXES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", re.ASCII)


def _split(text: str, example: str) -> tuple[str, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        found = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + ".."
        raise UsageError(f"expected a number with a unit such as {example}, found {found!r}")
    return match[1], match[2]


def parse_size(text: str) -> int:
    """Bytes of `4096`, `4KiB`, `1.5GiB` or `64M`.

    >>> parse_size("1.5GiB")
    1610612736
    """
    number, suffix = _split(text, "64MiB")
    factor = (_SIZE_SUFFIXES | _SHORT_SUFFIXES).get(suffix)
    if factor is None:
        raise UsageError(
            f"expected a size in bytes, KiB, MiB, GiB or TiB, found {text!r}; "
            f"write for example {number}MiB"
        )
    whole, _, fraction = number.partition(".")
    scaled = int(whole + fraction) * factor
    size, rest = divmod(scaled, int(10 ** len(fraction)))
    if rest:
        raise UsageError(f"expected a whole number of bytes, found {text!r}")
    if size > SIZE_MAX:
        raise UsageError(f"expected at most {SIZE_MAX} bytes, found {text!r}")
    return size


def format_size(size: int, *, exact: bool = False) -> str:
    """`exact` keeps every byte: the largest unit that divides the size.

    >>> format_size(1610612736), format_size(1610612736, exact=True)
    ('1.5 GiB', '1536MiB')
    """
    units = [("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)]
    if exact:
        unit, factor = next(((u, f) for u, f in units if size and size % f == 0), ("", 1))
        return f"{size // factor}{unit}"
    for unit, factor in units:
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def parse_range(text: str) -> tuple[int, int]:
    """(offset, length) of `START-END`, end exclusive.

    >>> parse_range("33MiB-34MiB")
    (34603008, 1048576)
    """
    start_text, dash, end_text = text.partition("-")
    if not dash:
        raise UsageError(f"expected a range START-END such as 0-1MiB, found {text!r}")
    try:
        start, end = parse_size(start_text), parse_size(end_text)
    except UsageError as problem:
        raise UsageError(f"expected a range START-END such as 0-1MiB: {problem}") from problem
    if start >= end:
        raise UsageError(
            f"expected a range that ends after it starts (end exclusive), found {text!r}"
        )
    return start, end - start


def format_range(offset: int, length: int) -> str:
    """As `parse_range` reads it."""
    return f"{format_size(offset, exact=True)}-{format_size(offset + length, exact=True)}"


def check_ranges(ranges: Iterable[tuple[int, int]], size: int) -> None:
    """Every range must lie inside a volume of `size` bytes."""
    for offset, length in ranges:
        if offset + length > size:
            raise UsageError(
                f"expected a range inside the volume (0-{format_size(size, exact=True)}), "
                f"found {format_range(offset, length)}"
            )


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as ranges that ascend and do not touch; an empty range is refused.

    >>> merge_ranges([(8192, 4096), (0, 4096), (4096, 100)])
    [(0, 4196), (8192, 4096)]
    """
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if length <= 0:
            raise UsageError(
                "expected a range with an end above its start, found "
                f"{format_range(offset, length)}"
            )
        if merged and offset <= sum(merged[-1]):
            begin, end = merged[-1][0], max(sum(merged[-1]), offset + length)
            merged[-1] = (begin, end - begin)
        else:
            merged.append((offset, length))
    return merged


def parse_rate(text: str) -> float:
    """Bytes a second of `200Mbit` (a second), as links are sold.

    >>> parse_rate("200Mbit")
    25000000.0
    """
    number, suffix = _split(text, "200Mbit")
    factor = _RATE_SUFFIXES.get(suffix)
    if factor is None or float(number) <= 0:
        raise UsageError(f"expected a rate above zero in kbit, Mbit or Gbit, found {text!r}")
    return float(number) * factor / 8


def parse_duration(text: str) -> float:
    """Seconds of `20ms`, `3s`, `5min`.

    >>> parse_duration("20ms")
    0.02
    """
    number, suffix = _split(text, "20ms")
    factor = _DURATION_SUFFIXES.get(suffix)
    if factor is None:
        raise UsageError(f"expected a duration in us, ms, s, min or h, found {text!r}")
    return float(number) * factor


def format_duration(seconds: float) -> str:
    """Short words for people.

    >>> format_duration(0.0123), format_duration(75), format_duration(7300)
    ('12 ms', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def parse_compression(text: str) -> str:
    """A way to compress, as it is written.

    >>> parse_compression("zstd:19")
    'zstd:19'
    """
    kind, colon, level = text.partition(":")
    whole = text in {"auto", "none", "zstd"}
    levelled = kind == "zstd" and bool(colon) and level.isascii() and level.isdigit()
    if not whole and not (levelled and 1 <= int(level) <= 22):
        raise UsageError(
            f"expected auto, none, zstd or zstd:1 to zstd:22 as compression, found {text!r}"
        )
    return text
