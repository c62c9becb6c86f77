"""An NBD export as a file (nbdfuse), and that file as a mounted ext4 (a loop device).

Guarantees: `detach` never hangs, also when the server is dead. Mounts are private to the test
process (`conftest.py`), the loop device goes with its mount, nbdfuse ends with us: nothing is left
behind however we end. Does not know: dualrestore.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.e2e.harness import DIES_WITH_US, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class FuseFile:
    """An NBD export as a file."""

    def __init__(self, directory: Path, export: Sequence[str | Path]) -> None:
        """`export`: a URI, or a server to start in nbdfuse's brackets."""
        self.directory = directory
        self.path = directory / "nbd"
        self._export = export
        self._server: subprocess.Popen[bytes] | None = None
        directory.mkdir(exist_ok=True)

    def attach(self) -> None:
        """Makes the file."""
        self._server = subprocess.Popen(
            [*DIES_WITH_US, "nbdfuse", self.path, *self._export],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until("nbdfuse serves its file", self.path.exists)

    def detach(self) -> None:
        """Takes it away, whatever state it is in."""
        run(["umount", "-l", self.directory], expect=None)
        if self._server is not None:
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait(10)
            self._server = None


class Mounted:
    """An export with an ext4 filesystem on it."""

    def __init__(self, uri: str, directory: Path) -> None:
        self.top = directory / "top"
        self.top.mkdir(exist_ok=True)
        self._file = FuseFile(directory / "fuse", [uri])

    def __enter__(self) -> Mounted:
        """Itself, not yet attached."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Detaches whatever is attached."""
        self.detach()

    def attach(self) -> None:
        """Makes the file that stands for the export."""
        self._file.attach()

    def make_filesystem(self) -> None:
        """An empty ext4 on it."""
        run(["mkfs.ext4", "-q", "-F", self._file.path])

    def mount(self) -> None:
        """Mounts it, replaying its journal."""
        run(["mount", "-o", "loop", self._file.path, self.top])

    def unmount(self) -> None:
        """Unmounts it and checks the filesystem: it must be clean."""
        run(["umount", self.top])
        checked = run(["e2fsck", "-fn", self._file.path], expect=None)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    def detach(self) -> None:
        """Takes everything apart, whatever state it is in."""
        run(["umount", "-l", self.top], expect=None)
        self._file.detach()
