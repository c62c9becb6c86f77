"""A workload whose every sector says where it belongs and which write it came from.

Guarantees: after any number of crashes, a block may hold its last flushed content or that of a
write issued since, sector by sector; anything else is reported as lost, stale or misplaced.
Does not know: who crashed. The caller says so.
"""

from __future__ import annotations

import random
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.e2e.nbd_client import NbdClient

BLOCK = 4096
SECTOR = 512
HEADER = struct.Struct("<8sQQI")
MAGIC = b"dr-stamp"


def stamped(sector: int, sequence: int) -> bytes:
    """One sector with its address, the sequence number of its write, and a checksum."""
    body = random.Random(sector * 1_000_003 + sequence).randbytes(SECTOR - HEADER.size)
    checksum = zlib.crc32(struct.pack("<QQ", sector, sequence) + body)
    return HEADER.pack(MAGIC, sector, sequence, checksum) + body


def read_stamp(sector: int, content: bytes) -> int:
    """The sequence number of the write that the sector came from; fails unless it is whole."""
    magic, address, sequence, checksum = HEADER.unpack_from(content)
    assert magic == MAGIC, f"sector {sector} holds no stamp: {content[:16].hex()}"
    assert address == sector, f"sector {sector} holds what belongs to sector {address}"
    found = zlib.crc32(struct.pack("<QQ", address, sequence) + content[HEADER.size :])
    assert found == checksum, f"sector {sector} is torn"
    return int(sequence)


class Shadow:
    """What each block of the volume may hold. `base` is its content before the first write."""

    def __init__(self, base: bytes, seed: int) -> None:
        assert len(base) % BLOCK == 0
        self.base = base
        self.blocks = len(base) // BLOCK
        self.random = random.Random(seed)
        self.sequence = 0
        self.acknowledged = 0
        self.durable: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.issued: dict[int, list[int]] = {}
        self.uncertain: set[int] = set()

    def write(self, client: NbdClient) -> None:
        """Writes one block, now and then with FUA."""
        block = self.random.randrange(self.blocks)
        self.sequence += 1
        sequence = self.sequence
        first = block * BLOCK // SECTOR
        content = b"".join(stamped(first + at, sequence) for at in range(BLOCK // SECTOR))
        self.issued.setdefault(block, []).append(sequence)
        fua = self.random.random() < 0.05
        client.write(block * BLOCK, content, fua=fua)
        self.acknowledged += 1
        self.last[block] = sequence
        self.uncertain.discard(block)
        if fua:
            self.durable[block] = sequence
            self.issued[block] = []

    def flush(self, client: NbdClient) -> None:
        """A flush; what was acknowledged before it may not be lost any more."""
        client.flush()
        for block in self.last.keys() - self.uncertain:
            self.durable[block] = self.last[block]
            self.issued[block] = []

    def check(self, client: NbdClient, block: int) -> None:
        """Reads one block and compares."""
        content = client.read(block * BLOCK, BLOCK)
        if block in self.uncertain:
            self._settle(client, block, content)
            return
        if block not in self.last:
            expected = self.base[block * BLOCK : (block + 1) * BLOCK]
            assert content == expected, f"block {block}, never written, does not hold its old bytes"
            return
        for at in range(BLOCK // SECTOR):
            sector = block * BLOCK // SECTOR + at
            found = read_stamp(sector, content[at * SECTOR : (at + 1) * SECTOR])
            assert found == self.last[block], (
                f"block {block} holds write {found}, the last acknowledged is {self.last[block]}"
            )

    def _settle(self, client: NbdClient, block: int, content: bytes) -> None:
        """After a crash: every sector flushed or newer; then the block gets a known content."""
        allowed = {*self.issued.get(block, [])}
        if block in self.durable:
            allowed.add(self.durable[block])
        old = self.base[block * BLOCK : (block + 1) * BLOCK]
        for at in range(BLOCK // SECTOR):
            part = content[at * SECTOR : (at + 1) * SECTOR]
            if block not in self.durable and part == old[at * SECTOR : (at + 1) * SECTOR]:
                continue
            found = read_stamp(block * BLOCK // SECTOR + at, part)
            assert found in allowed, f"block {block} holds write {found}, allowed {sorted(allowed)}"
        self.sequence += 1
        first = block * BLOCK // SECTOR
        content = b"".join(stamped(first + at, self.sequence) for at in range(BLOCK // SECTOR))
        self.issued.setdefault(block, []).append(self.sequence)
        client.write(block * BLOCK, content)
        self.last[block] = self.sequence
        self.uncertain.discard(block)

    def crashed(self) -> None:
        """The primary was killed: what was not flushed may or may not be there."""
        self.uncertain.update(block for block, issued in self.issued.items() if issued)

    def step(self, client: NbdClient) -> None:
        """One random request."""
        choice = self.random.random()
        if choice < 0.60:
            self.write(client)
        elif choice < 0.95:
            self.check(client, self.random.randrange(self.blocks))
        else:
            self.flush(client)

    def check_all(self, client: NbdClient) -> None:
        """Reads the whole volume and compares every block."""
        for block in range(self.blocks):
            self.check(client, block)
