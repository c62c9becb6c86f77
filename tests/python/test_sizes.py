"""Words for quantities."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualrestore.errors import UsageError
from dualrestore.sizes import (
    SIZE_MAX,
    check_ranges,
    format_duration,
    format_range,
    format_size,
    parse_duration,
    parse_range,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("4KiB", 4096),
        (" 64 MiB ", 64 << 20),
        ("1.5GiB", 3 << 29),
        ("2T", 2 << 40),
        ("0.5KiB", 512),
    ],
)
def test_a_size_with_a_binary_suffix_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "-1", "1MB", "1kB", "MiB", "1.3", "0.1KiB", "1e3", "0x10", "\u0661", "1 2", "9999999TiB"],
)
def test_a_word_that_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        parse_size(text)


@given(st.integers(0, SIZE_MAX))
def test_an_exactly_written_size_is_read_back(size: int) -> None:
    assert parse_size(format_size(size, exact=True)) == size


def test_a_size_for_people_is_short() -> None:
    assert [format_size(size) for size in (0, 1023, 1024, 3 << 29, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 GiB",
        "5 TiB",
    ]


@given(st.integers(0, 1 << 40), st.integers(1, 1 << 40))
def test_a_written_range_is_read_back(offset: int, length: int) -> None:
    assert parse_range(format_range(offset, length)) == (offset, length)


@pytest.mark.parametrize("text", ["5", "1MiB-1MiB", "2-1", "-5", "a-b", "1-2-3"])
def test_a_word_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_range(text)


def test_a_range_outside_the_volume_is_named() -> None:
    check_ranges([(0, 4096), (4096, 4096)], 8192)
    with pytest.raises(UsageError, match="found 4KiB-12KiB"):
        check_ranges([(4096, 8192)], 8192)


def test_rates_and_durations_are_read() -> None:
    assert parse_rate("200Mbit") == 25e6
    assert parse_rate("1Gbit") == 125e6
    assert parse_duration("20ms") == pytest.approx(0.02)
    assert parse_duration("1.5min") == 90


@pytest.mark.parametrize("text", ["200", "200MiB", "0Mbit", "fast"])
def test_a_word_that_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)


@pytest.mark.parametrize("text", ["20", "20ns", "soon"])
def test_a_word_that_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_durations_for_people_are_short() -> None:
    assert [format_duration(seconds) for seconds in (0.012, 3.26, 75, 7300)] == [
        "12 ms",
        "3.3 s",
        "1 min 15 s",
        "2 h 1 min",
    ]
