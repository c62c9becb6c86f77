"""A primary and a backup in one process, as the Python API has them: no daemon, no socket between
them, the link's bytes carried by hand.

Guarantees: `close` ends everything, also after a failure. Does not know: what is written.
"""

import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dualrestore.core import (
    BackupVolume,
    LinkConnection,
    LinkHub,
    NbdServer,
    PrimaryVolume,
    merge_into_volume,
)
from dualrestore.errors import BusyError
from dualrestore.model import MergeReport
from tests.e2e.nbd_client import NbdClient

Volume = TypeVar("Volume", PrimaryVolume, BackupVolume)

NAME = "v"
SECONDS = 30.0
PIECE_BYTES = 1 << 18
THIN_SECONDS = 0.005


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    """Asks until it holds."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"not within {SECONDS} s: {what}"
        time.sleep(0.002)


class Wire(threading.Thread):
    """One session's three connections, carried from core to core until it is cut."""

    def __init__(self, primary: PrimaryVolume, ours: LinkHub, theirs: LinkHub) -> None:
        super().__init__(daemon=True, name="wire")
        self._hubs = (ours, theirs)
        self._pairs: list[tuple[LinkConnection, LinkConnection]] = [
            (ours.connect(primary, 0, NAME, link_class), theirs.accept())
            for link_class in ("mirror", "demand", "bulk")
        ]
        self._cut = threading.Event()
        self.problem: str | None = None
        self.thin = False
        """One frame at a time, with a pause after it."""
        self.bytes_carried = 0
        """From the primary."""
        self.start()

    def run(self) -> None:
        """Until it is cut, or a connection ends."""
        try:
            while not self._cut.is_set():
                for one, other in self._pairs:
                    self.bytes_carried += carry(one, other, thin=self.thin)
                    carry(other, one)
                    one.tick()
                    other.tick()
                ends = [end for pair in self._pairs for end in pair]
                if any(end.state in {"closed", "failed"} for end in ends):
                    self.problem = "; ".join(str(end.error) for end in ends if end.error)
                    break
                select.select([hub.wake_descriptor for hub in self._hubs], [], [], 0.02)
                for hub in self._hubs:
                    hub.ready()
        finally:
            for pair in self._pairs:
                for end in pair:
                    end.close()

    def cut(self) -> None:
        """Both sides learn that it is gone."""
        self._cut.set()
        self.join(SECONDS)
        assert not self.is_alive()


def once_unlocked(open_it: Callable[[], Volume]) -> Volume:
    """Opens a volume whose threads may still hold what was just closed."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return open_it()
        except BusyError:
            assert time.monotonic() < deadline, "still locked"
            time.sleep(0.002)


def carry(source: LinkConnection, target: LinkConnection, *, thin: bool = False) -> int:
    """What one side has to say, to the other. How many bytes that were."""
    carried = 0
    while (said := source.take_outgoing(1 if thin else PIECE_BYTES)) is not None:
        target.receive(bytearray(memoryview(said)), len(said))
        carried += len(said)
        if thin:
            time.sleep(THIN_SECONDS)
    return carried


class LivePair:
    """Both volumes, the wire between them, and an NBD client of the primary."""

    def __init__(self, place: Path, size: int, block_size: int = 4096) -> None:
        self.place = place
        self.size = size
        self.block_size = block_size
        self.primary_device = place / "primary.img"
        self.mirror_device = place / "mirror.img"
        for name in ("primary", "backup"):
            (place / name).mkdir()
        self.wire: Wire | None = None
        self.backup = self._open_backup()
        self.primary = self._open_primary()
        self.mend()

    def _open_backup(self) -> BackupVolume:
        self.theirs = LinkHub()
        backup = once_unlocked(
            lambda: BackupVolume.open(
                str(self.place / "backup"),
                NAME,
                str(self.mirror_device),
                size=self.size,
                block_size=self.block_size,
            )
        )
        self.theirs.serve(backup)
        return backup

    def _open_primary(self) -> PrimaryVolume:
        self.ours = LinkHub()
        primary = once_unlocked(
            lambda: PrimaryVolume.open(
                str(self.place / "primary"),
                NAME,
                str(self.primary_device),
                size=self.size,
                block_size=self.block_size,
                mirror="flush",
                backups=1,
                missing_deadline_ms=100,
            )
        )
        self.server = NbdServer()
        self.server.add_volume(NAME, primary)
        self.client = self.connect(self.server, NAME)
        return primary

    @staticmethod
    def connect(server: NbdServer, name: str) -> NbdClient:
        """A client of one of the exports."""
        ours, theirs = socket.socketpair()
        server.serve(theirs.detach(), "test")
        return NbdClient(ours, name)

    @property
    def is_connected(self) -> bool:
        """Whether the wire leads to the backup."""
        return self.wire is not None and bool(self.status()["backups"][0]["connected"])

    def status(self) -> dict[str, Any]:
        """Of the primary."""
        return self.primary.status()

    def cut(self) -> None:
        """Cuts the wire, if it is not cut."""
        if self.wire is not None:
            self.wire.cut()
            self.wire = None

    def mend(self) -> None:
        """A new wire; returns when it is in use. A session that is not over yet is waited for."""

        def in_use() -> bool:
            if self.wire is None or not self.wire.is_alive():
                self.cut()
                self.wire = Wire(self.primary, self.ours, self.theirs)
            return self.is_connected

        wait_until("the wire is in use", in_use)

    def restore(self, lost: str | list[tuple[int, int]]) -> None:
        """Declares a loss; a wire is made anew."""
        self.primary.restore(lost)  # type: ignore[arg-type]
        if self.wire is not None:
            self.cut()
            self.mend()

    def snapshot(self) -> str:
        """A cut at the backup."""
        return str(self.primary.snapshot("", timeout_ms=10_000)["snapshot"])

    def merge(self, bundle: Path) -> MergeReport:
        """Into the live volume."""
        return merge_into_volume(bundle, self.primary)

    def read_snapshot(self, snapshot: str) -> bytes:
        """All of it, over NBD."""
        server = NbdServer()
        server.add_snapshot("s", self.backup, snapshot)
        try:
            with self.connect(server, "s") as client:
                return client.read(0, self.size)
        finally:
            server.remove("s")
            server.shutdown(5_000)

    def reopen_primary(self) -> None:
        """Closes it cleanly and opens it again; the wire is cut."""
        self._close_primary()
        self.primary = self._open_primary()

    def reopen_backup(self) -> None:
        """The same for the backup."""
        self._close_backup()
        self.backup = self._open_backup()

    # A volume is unlocked once nobody holds it: not the hub, nor the server.

    def _close_primary(self) -> None:
        self.client.close()
        self.server.shutdown(5_000)
        self.cut()
        self.primary.close()
        del self.primary, self.server, self.ours

    def _close_backup(self) -> None:
        self.cut()
        self.backup.close()
        del self.backup, self.theirs

    def wait_mirrored(self) -> None:
        """Until the primary says so."""
        wait_until("mirrored", lambda: bool(self.status()["mirrored"]))

    def close(self) -> None:
        """Ends everything."""
        self._close_primary()
        self._close_backup()
