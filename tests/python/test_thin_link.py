"""What crosses a link that is slower than those who write."""

import os
from pathlib import Path

import pytest

from tests.python.live_pair import LivePair, Wire, wait_until

KIB = 1024
SIZE = 4 << 20


@pytest.fixture(name="pair")
def _pair(tmp_path: Path) -> "LivePair":
    pair = LivePair(tmp_path, SIZE)
    wait_until("it is mirrored", lambda: bool(pair.status()["mirrored"]))
    return pair


def written(pair: LivePair, writes: list[tuple[int, bytes]]) -> int:
    """What the wire carried of them until both sides were the same."""
    wire = pair.wire
    assert isinstance(wire, Wire)
    wire.thin, before = True, wire.bytes_carried
    for offset, content in writes:
        pair.client.write(offset, content)
    pair.client.flush()
    wait_until("it is mirrored", lambda: bool(pair.status()["mirrored"]))
    pair.close()
    assert pair.primary_device.read_bytes() == pair.mirror_device.read_bytes()
    return wire.bytes_carried - before


def test_a_thin_link_carries_blocks_compressed(pair: LivePair) -> None:
    text = b"It was a dark and stormy night. " * (32 * KIB // 32)
    writes = [(index * len(text), text) for index in range(64)]
    assert written(pair, writes) < 64 * len(text) // 2


def test_what_does_not_shrink_goes_as_it_is(pair: LivePair) -> None:
    writes = [(index * 32 * KIB, os.urandom(32 * KIB)) for index in range(64)]
    assert written(pair, writes) >= 64 * 32 * KIB


def test_of_a_block_that_is_written_again_and_again_only_some_states_cross_a_thin_link(
    pair: LivePair,
) -> None:
    writes = [(0, os.urandom(32 * KIB)) for _ in range(64)]
    assert written(pair, writes) < 64 * 32 * KIB // 2
