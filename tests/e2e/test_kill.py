"""kill -9 of either daemon in the middle of a verifying workload, again and again."""

from __future__ import annotations

import errno
import time

import pytest

from tests.e2e.harness import MIB, Pair
from tests.e2e.nbd_client import NbdClient
from tests.e2e.stamps import BLOCK
from tests.e2e.workload import Workload, check_volume, prepared

SIZE = 16 * MIB


def test_the_primary_killed_again_and_again_loses_and_rolls_back_nothing(seed: int) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        medium = pair.bundle(pair.snapshot())
        for cycle in range(4):
            workload = Workload(pair, shadow)
            workload.start()
            workload.wait_for_writes(150)
            if cycle == 2:
                pair.merge(medium)
            pair.primary.kill()
            workload.finish()
            assert workload.cut_off
            shadow.crashed()
            pair.primary.start()
        check_volume(pair, shadow)
        pair.merge(medium)
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_the_backup_killed_again_and_again_is_caught_up_with(seed: int) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        medium = pair.bundle(pair.snapshot())
        pair.merge(medium)
        for _ in range(3):
            workload = Workload(pair, shadow)
            workload.start()
            workload.wait_for_writes(100)
            pair.backup.kill()
            workload.wait_for_writes(100)
            pair.backup.start()
            workload.wait_for_writes(50)
            workload.finish()
            assert not workload.cut_off, "the primary went on without its backup"
        check_volume(pair, shadow)
        pair.wait_mirrored()
        pair.stop_and_compare()


def test_a_read_of_a_missing_block_waits_for_the_backup_to_come_back(seed: int) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        pair.backup.kill()
        workload = Workload(pair, shadow)
        workload.start()
        time.sleep(1.0)
        pair.backup.start()
        workload.wait_for_writes(50)
        workload.finish()
        assert not workload.cut_off
        check_volume(pair, shadow)
        pair.wait_mirrored()


def test_a_read_of_a_missing_block_fails_after_its_deadline_and_current_ones_go_on() -> None:
    with Pair(SIZE, more='missing_deadline = "1s"') as pair:
        prepared(pair, 1)
        with NbdClient(pair.socket, "v") as client:
            client.read(0, BLOCK)
            pair.backup.kill()
            client.write(8 * BLOCK, b"\x55" * BLOCK)
            client.flush()
            with pytest.raises(OSError, match="answered with an error") as caught:
                client.read(SIZE // 2, BLOCK)
            assert caught.value.errno == errno.EIO
            assert client.read(8 * BLOCK, BLOCK) == b"\x55" * BLOCK
            assert len(client.read(0, BLOCK)) == BLOCK


def test_both_killed_keep_what_was_flushed(seed: int) -> None:
    with Pair(SIZE) as pair:
        shadow = prepared(pair, seed)
        for _ in range(2):
            workload = Workload(pair, shadow)
            workload.start()
            workload.wait_for_writes(100)
            pair.primary.kill()
            pair.backup.kill()
            workload.finish()
            shadow.crashed()
            pair.backup.start()
            pair.primary.start()
        check_volume(pair, shadow)
        pair.merge(pair.bundle(pair.snapshot()))
        pair.wait_mirrored()
        pair.stop_and_compare()
