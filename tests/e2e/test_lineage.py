"""A full bundle of a snapshot over two media, written at two times, and an incremental one that
goes on from it: newest first into a replica, without us by recover.py, and into a live volume that
lost its disk.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.e2e.harness import MIB, Pair, dualrestore, garbage, run
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SIZE = 16 * MIB
BLOCK = 4096


class Told:
    """The volume, and what it must hold."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.random = random.Random(seed)
        image = pair.directory / "image"
        garbage(image, SIZE)
        self.state = bytearray(image.read_bytes())
        run(["nbdcopy", image, pair.uri])
        self.pair.wait_mirrored()

    def write(self, count: int) -> set[int]:
        """Writes some blocks, a third of them zeros; which."""
        blocks = self.random.sample(range(SIZE // BLOCK), count)
        with NbdClient(self.pair.socket, "v") as client:
            for at, block in enumerate(blocks):
                content = bytes(BLOCK) if at % 3 == 0 else self.random.randbytes(BLOCK)
                client.write(block * BLOCK, content)
                self.state[block * BLOCK : (block + 1) * BLOCK] = content
            client.flush()
        return set(blocks)

    def bundle(self, snapshot: str, *words: str | Path, code: int = 0) -> None:
        self.pair.backup.verb("bundle", "create", f"v@{snapshot}", *words, expect=code)


def merge(pair: Pair, media: Iterable[Path], name: str, *, code: int = 0) -> bytes:
    """Into a new replica full of garbage; what it holds then."""
    replica, over = pair.directory / f"{name}.img", pair.directory / f"{name}.map"
    garbage(replica, SIZE)
    dualrestore("map", "create", over, "--size", str(SIZE))
    dualrestore("merge", *media, replica, "--map", over, expect=code)
    return replica.read_bytes()


def test_two_media_and_an_incremental_bundle_give_the_newest_cut_wherever_they_go(
    seed: int,
) -> None:
    with Pair(SIZE) as pair:
        told = Told(pair, seed)
        first, full_image = pair.snapshot(), bytes(told.state)
        names = ("first", "second", "newer")
        one, two, newer = (pair.directory / name for name in names)
        told.write(300)
        # The first medium is full; the second comes when the volume has moved on.
        size = ["--medium-size", "9MiB"]
        out = pair.backup.verb_json("bundle", "create", f"v@{first}", "--to", one, *size, expect=6)
        assert (out["complete"], out["next_medium"]) == (False, 2)
        told.write(300)
        told.bundle(first, "--to", two, "--continue")
        second, image = pair.snapshot(), bytes(told.state)
        # What changed since a cut is known also when its snapshot is gone.
        pair.backup.verb("snapshot", "v", "--delete", first)
        told.bundle(second, "--since", first, "--to", newer)
        later = told.write(200)
        pair.wait_mirrored()
        assert merge(pair, [two, one], "full") == full_image
        assert merge(pair, [newer, two, one], "replica") == image
        merge(pair, [one, two, newer], "wrong", code=5)
        out_image = pair.directory / "out.img"
        run(["python3", "-I", one / "recover.py", two, newer, one, out_image])
        assert out_image.read_bytes() == image
        # After the loss they supply all but what was written after the second cut.
        pair.lose_disk()
        written = sum(pair.merge(medium)["bytes_written"] for medium in (newer, two, one))
        assert written == SIZE - len(later) * BLOCK
        with NbdClient(pair.socket, "v") as client:
            held = b"".join(client.read(at, MIB) for at in range(0, SIZE, MIB))
        assert held == told.state
        pair.wait_mirrored()
        pair.stop_and_compare()
