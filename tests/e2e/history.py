"""One client's writes in their order, so that a cut can be compared with what the volume held.

A single client with one request at a time writes; so the states that the volume went through are
known, and a snapshot must be one of those between the beginning and the end of its cut.

Guarantees: `Cut.check` fails unless the image is exactly such a state, byte by byte.
Does not know: daemons that die. The primary lives.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from pathlib import Path

BLOCK = 4096
SECTOR = 512


class Write(NamedTuple):
    """Stamped blocks, or zeros."""

    number: int
    offset: int
    length: int
    zeros: bool

    def content(self) -> bytes:
        """Every 16 bytes say to which sector they belong and which write they came from."""
        if self.zeros:
            return bytes(self.length)
        sectors = range(self.offset // SECTOR, (self.offset + self.length) // SECTOR)
        return b"".join(struct.pack("<QQ", at, self.number) * (SECTOR // 16) for at in sectors)


class Cut(NamedTuple):
    """What a snapshot may hold: the state before its cut began, or after any of these writes."""

    before: bytes
    writes: list[Write]

    def check(self, image: bytes, what: str) -> None:
        """Fails unless the image is one of the states."""
        state = bytearray(self.before)
        for write in [None, *self.writes]:
            if write is not None:
                state[write.offset : write.offset + write.length] = write.content()
            if image == state:
                return
        blocks = range(0, len(state), BLOCK)
        wrong = [at // BLOCK for at in blocks if image[at : at + BLOCK] != state[at : at + BLOCK]]
        shown = {at: struct.unpack_from("<QQ", image, at * BLOCK) for at in wrong[:8]}
        raise AssertionError(
            f"{what} is no state that the volume had at its cut: {len(wrong)} blocks differ from "
            f"the one after write {self.writes[-1].number if self.writes else '(none)'}: {shown}"
        )


class Writer(threading.Thread):
    """Writes until it is told to end."""

    def __init__(self, socket: Path, size: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._socket = socket
        self._size = size
        self._random = random.Random(seed)
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._writes: list[Write] = []
        self._state = bytearray(size)
        self._acknowledged = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        """One write after the other; now and then a flush."""
        try:
            with NbdClient(self._socket, "v") as client:
                while not self._ending.is_set():
                    self._step(client)
        except BaseException as problem:
            self.problem = problem

    def _step(self, client: NbdClient) -> None:
        chance = self._random
        # Short runs and long ones are preserved in different ways.
        blocks = chance.choice((1, 1, 1, 2, 5, 16, 100))
        first = chance.randrange(self._size // BLOCK - blocks)
        zeros = chance.random() < 0.1
        with self._lock:
            write = Write(len(self._writes) + 1, first * BLOCK, blocks * BLOCK, zeros)
            self._writes.append(write)
        content = write.content()
        if zeros:
            client.write_zeroes(write.offset, write.length)
        else:
            client.write(write.offset, content, fua=chance.random() < 0.02)
        with self._lock:
            self._state[write.offset : write.offset + write.length] = content
            self._acknowledged += 1
        if chance.random() < 0.03:
            client.flush()

    def begin_cut(self) -> tuple[bytes, int]:
        """To be called before a cut is asked for."""
        with self._lock:
            return bytes(self._state), self._acknowledged

    def end_cut(self, begun: tuple[bytes, int]) -> Cut:
        """To be called when it was answered, or will never be."""
        before, acknowledged = begun
        with self._lock:
            return Cut(before, self._writes[acknowledged:])

    def wait_for(self, count: int) -> None:
        """Waits until so many more writes are acknowledged."""
        goal, deadline = self._acknowledged + count, time.monotonic() + 60
        while self._acknowledged < goal and self.is_alive():
            assert time.monotonic() < deadline, f"fewer than {count} writes in a minute"
            time.sleep(0.002)

    def finish(self) -> None:
        """Ends it; what went wrong is raised here."""
        self._ending.set()
        self.join(60)
        assert not self.is_alive(), "a request was not answered within its deadline"
        if self.problem is not None:
            raise self.problem
