"""Benchmarks of what Python users and shells see: merge, map views, NBD requests, start-up."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

import dualrestore as dr
from tests.e2e.harness import MIB, Pair, dualrestore
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

SIZE = 64 * MIB


@pytest.fixture(scope="module")
def mirrored() -> Iterator[Pair]:
    """A mirrored volume in memory."""
    with Pair(SIZE, place="/dev/shm") as pair:
        yield pair


def test_merge_of_a_raw_image_into_a_file_half_current(
    benchmark: BenchmarkFixture, tmp_path: Path
) -> None:
    source, target = tmp_path / "source.img", tmp_path / "target.img"
    source.write_bytes(bytes(range(256)) * (SIZE // 256))
    target.write_bytes(bytes(SIZE))
    rounds = iter(range(1000))

    def fresh() -> tuple[tuple[Path, Path, dr.OverwriteMap], dict[str, object]]:
        over = dr.OverwriteMap.create(tmp_path / f"{next(rounds)}.map", size=SIZE, block_size=4096)
        for offset in range(0, SIZE, 2 * MIB):
            over.mark_current(offset, MIB)
        return (source, target, over), {}

    report = benchmark.pedantic(dr.merge, setup=fresh, rounds=3)
    assert report.bytes_written == SIZE // 2


def test_scan_of_a_scattered_map(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    with dr.OverwriteMap.create(tmp_path / "m", size=4096 * 100_000, block_size=4096) as over:
        for block in range(0, 100_000, 20):
            over.mark_current(block * 4096, 4096)
        assert benchmark(lambda: sum(1 for _ in over.missing_extents())) == 5_000


def test_map_as_an_array(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    with dr.OverwriteMap.create(tmp_path / "m", size=1 << 36, block_size=4096) as over:
        benchmark(over.to_numpy)


def random_blocks() -> Iterator[int]:
    """Offsets of blocks, the same in every run."""
    chance = random.Random(1)
    while True:
        yield chance.randrange(SIZE // 4096) * 4096


def test_nbd_random_read_of_four_kibibytes(benchmark: BenchmarkFixture, mirrored: Pair) -> None:
    offsets = random_blocks()
    with NbdClient(mirrored.socket, "v") as client:
        assert len(benchmark(lambda: client.read(next(offsets), 4096))) == 4096


def test_nbd_random_mirrored_write_of_four_kibibytes(
    benchmark: BenchmarkFixture, mirrored: Pair
) -> None:
    offsets = random_blocks()
    with NbdClient(mirrored.socket, "v") as client:
        benchmark(lambda: client.write(next(offsets), b"\x33" * 4096))


def test_nbd_random_mirrored_write_and_flush(benchmark: BenchmarkFixture, mirrored: Pair) -> None:
    offsets = random_blocks()

    def write_and_flush(client: NbdClient) -> None:
        client.write(next(offsets), b"\x44" * 4096)
        client.flush()

    with NbdClient(mirrored.socket, "v") as client:
        benchmark(write_and_flush, client)


def test_nbd_sequential_read_of_all(benchmark: BenchmarkFixture, mirrored: Pair) -> None:
    def read_all(client: NbdClient) -> int:
        return sum(len(client.read(offset, MIB)) for offset in range(0, SIZE, MIB))

    with NbdClient(mirrored.socket, "v") as client:
        assert benchmark.pedantic(read_all, args=(client,), rounds=3) == SIZE


def test_nbd_sequential_mirrored_write_of_all(benchmark: BenchmarkFixture, mirrored: Pair) -> None:
    def write_all(client: NbdClient) -> None:
        for offset in range(0, SIZE, MIB):
            client.write(offset, b"\x55" * MIB)
        client.flush()

    with NbdClient(mirrored.socket, "v") as client:
        benchmark.pedantic(write_all, args=(client,), rounds=3)


def test_snapshot_write_path(benchmark: BenchmarkFixture, mirrored: Pair) -> None:
    """Writes to blocks whose old content must be preserved at the backup first, then flush."""
    mirrored.snapshot()
    offsets = iter(range(0, SIZE, 4096))

    def first_write(client: NbdClient) -> None:
        client.write(next(offsets), b"\x55" * 4096)
        client.flush()

    with NbdClient(mirrored.socket, "v") as client:
        benchmark.pedantic(first_write, args=(client,), rounds=50)


def test_start_of_the_command_line(benchmark: BenchmarkFixture) -> None:
    benchmark.pedantic(dualrestore, args=("--version",), rounds=5)
