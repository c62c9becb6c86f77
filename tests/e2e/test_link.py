"""The cable between the two machines: cut, pulled silently, cut again and again."""

from __future__ import annotations

import time

from tests.e2e.harness import MIB, Pair, wait_until
from tests.e2e.nbd_client import NbdClient
from tests.e2e.stamps import BLOCK
from tests.e2e.workload import Workload, check_volume, prepared

SIZE = 16 * MIB


def test_writes_go_on_while_the_link_is_cut_and_the_backup_catches_up(seed: int) -> None:
    with Pair(SIZE, cabled=True) as pair:
        shadow = prepared(pair, seed)
        pair.merge(pair.bundle(pair.snapshot()))
        workload = Workload(pair, shadow)
        workload.start()
        workload.wait_for_writes(50)
        pair.cable.cut()
        workload.wait_for_writes(200)
        wait_until("the cut is noticed", lambda: pair.primary.status()["state"] == "degraded")
        assert pair.primary.status()["unsent_bytes"] > 0
        pair.cable.mend()
        workload.wait_for_writes(50)
        workload.finish()
        assert not workload.cut_off
        check_volume(pair, shadow)
        pair.wait_mirrored()
        assert pair.primary.status()["bytes_resent"] > 0
        pair.stop_and_compare()


def test_after_a_crash_of_the_primary_little_of_its_hot_extents_crosses_the_link() -> None:
    with Pair(SIZE) as pair:
        with NbdClient(pair.socket, "v") as client:
            for offset in range(0, SIZE, MIB):
                client.write(offset, bytes(range(256)) * 16)
            client.flush()
        pair.primary.kill()
        pair.primary.start()
        pair.wait_mirrored()
        status = pair.primary.status()
        assert status["recovered_unsent_blocks"] >= MIB // 4096
        presumed = status["recovered_unsent_blocks"] * 4096
        assert (status["bytes_resent"], status["bytes_found_equal"]) == (0, presumed)
        pair.stop_and_compare()


def test_nothing_is_lost_or_mixed_up_by_cuts_again_and_again_during_hydration(seed: int) -> None:
    with Pair(SIZE, cabled=True) as pair:
        shadow = prepared(pair, seed)
        pair.primary.verb("restore", "v", "--lost", "all", "--wire")
        workload = Workload(pair, shadow)
        workload.start()
        for _ in range(8):
            workload.wait_for_writes(25)
            pair.cable.cut()
            time.sleep(0.1)
            pair.cable.mend()
        workload.wait_for_writes(25)
        workload.finish()
        assert not workload.cut_off
        pair.wait_mirrored()
        check_volume(pair, shadow)
        pair.stop_and_compare()


def test_a_link_that_falls_silent_holds_a_flush_only_until_it_is_given_up(seed: int) -> None:
    with Pair(SIZE, cabled=True) as pair:
        shadow = prepared(pair, seed)
        pair.merge(pair.bundle(pair.snapshot()))
        pair.cable.freeze()
        with NbdClient(pair.socket, "v") as client:
            shadow.write(client)
            assert pair.primary.status()["mirrored"] is False
            shadow.flush(client)
            assert pair.primary.status()["state"] == "degraded", "acknowledged without the backup"
        assert pair.primary.status()["unsent_bytes"] >= BLOCK
        pair.cable.mend()
        pair.wait_mirrored()
        check_volume(pair, shadow)
        pair.stop_and_compare()


def test_what_is_on_its_way_to_the_backup_is_not_called_mirrored() -> None:
    with Pair(SIZE, cabled=True) as pair:
        pair.wait_mirrored()
        pair.cable.freeze()
        with NbdClient(pair.socket, "v") as client:
            client.write(0, b"\x11" * BLOCK)
            status = pair.primary.status()
            assert (status["state"], status["mirrored"]) == ("mirroring", False)
            pair.cable.mend()
            client.flush()
        pair.wait_mirrored()
        pair.stop_and_compare()
