"""Sectors that say where they belong and how old they are."""

import numpy
import pytest

from dualrestore.jobs.demo.stamps import Findings, Words, examine, stamp


def sectors(first: int, count: int) -> Words:
    return numpy.arange(first, first + count, dtype=numpy.uint64)


def sequences(*values: int) -> Words:
    return numpy.array(values, dtype=numpy.uint64)


def test_what_was_stamped_is_found_right() -> None:
    said = sequences(1, 0, 7, 2**40)
    assert examine(stamp(sectors(100, 4), said).tobytes(), 100, said) == Findings()


def test_an_older_sector_is_stale() -> None:
    old = stamp(sectors(5, 2), sequences(1, 1)).tobytes()
    assert examine(old, 5, sequences(1, 2)) == Findings(stale=1)


def test_zeros_where_something_was_written_are_stale() -> None:
    assert examine(bytes(512), 5, sequences(3)) == Findings(stale=1)


def test_a_sector_of_another_place_is_wrong() -> None:
    foreign = stamp(sectors(6, 1), sequences(1)).tobytes()
    assert examine(foreign, 5, sequences(1)) == Findings(wrong=1)


def test_a_newer_sector_than_was_ever_written_is_wrong() -> None:
    newer = stamp(sectors(5, 1), sequences(9)).tobytes()
    assert examine(newer, 5, sequences(1)) == Findings(wrong=1)


@pytest.mark.parametrize("byte", [0, 8, 16, 24, 300, 504, 511])
def test_one_flipped_bit_anywhere_is_found(byte: int) -> None:
    data = bytearray(stamp(sectors(5, 1), sequences(4)).tobytes())
    data[byte] ^= 0x10
    found = examine(data, 5, sequences(4))
    assert found.stale + found.wrong == 1


def test_a_torn_sector_is_wrong_and_not_stale() -> None:
    old = stamp(sectors(5, 1), sequences(1)).tobytes()
    new = stamp(sectors(5, 1), sequences(2)).tobytes()
    assert examine(new[:256] + old[256:], 5, sequences(2)) == Findings(wrong=1)


def test_findings_add_up() -> None:
    found = Findings(stale=1)
    found.add(Findings(stale=2, wrong=3))
    assert found == Findings(stale=3, wrong=3)
