"""A verifying workload in a thread of its own, and a volume prepared for it.

Does not know: what happens to the daemons meanwhile.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from tests.e2e.harness import run
from tests.e2e.nbd_client import NbdClient
from tests.e2e.stamps import BLOCK, Shadow

if TYPE_CHECKING:
    from tests.e2e.harness import Pair


class Workload(threading.Thread):
    """Runs a shadowed workload until it is told to end or its connection breaks."""

    def __init__(self, pair: Pair, shadow: Shadow) -> None:
        super().__init__(daemon=True)
        self.pair = pair
        self.shadow = shadow
        self.ending = threading.Event()
        self.problem: BaseException | None = None
        self.cut_off = False

    def run(self) -> None:
        """One request after the other."""
        try:
            with NbdClient(self.pair.socket, "v") as client:
                while not self.ending.is_set():
                    self.shadow.step(client)
        except ConnectionError:
            self.cut_off = True
        except BaseException as problem:
            self.problem = problem

    def finish(self) -> None:
        """Ends it; what it found wrong is raised here."""
        self.ending.set()
        self.join(90)
        assert not self.is_alive(), "a request was not answered within its deadline"
        if self.problem is not None:
            raise self.problem

    def wait_for_writes(self, count: int) -> None:
        """Waits until it has made so many more acknowledged writes."""
        goal = self.shadow.acknowledged + count
        deadline = time.monotonic() + 60
        while self.shadow.acknowledged < goal and self.is_alive():
            assert time.monotonic() < deadline, f"fewer than {count} writes in a minute"
            time.sleep(0.01)


def prepared(pair: Pair, seed: int) -> Shadow:
    """A mirrored volume full of known bytes, then lost at the primary."""
    blocks = pair.size // BLOCK
    base = b"".join(block.to_bytes(8, "little") * (BLOCK // 8) for block in range(blocks))
    image = pair.directory / "base.raw"
    image.write_bytes(base)
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.lose_disk()
    return Shadow(base, seed)


def check_volume(pair: Pair, shadow: Shadow) -> None:
    """Reads and compares everything."""
    with NbdClient(pair.socket, "v") as client:
        shadow.check_all(client)
