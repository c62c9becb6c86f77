"""An export as a mounted filesystem: nbdfuse, a loop device, ext4.

Guarantees: `detach` never hangs, also when the server is dead, and detaches only its own devices.
Does not know: dualrestore.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from tests.e2e.harness import run, wait_until

if TYPE_CHECKING:
    from pathlib import Path


class Mounted:
    """A block device made of an NBD export, with an ext4 filesystem on it."""

    def __init__(self, uri: str, directory: Path) -> None:
        self.uri = uri
        self.fuse = directory / "fuse"
        self.top = directory / "top"
        self.fuse.mkdir(exist_ok=True)
        self.top.mkdir(exist_ok=True)
        self._server: subprocess.Popen[bytes] | None = None
        self._loop = ""

    def __enter__(self) -> Mounted:
        """Itself, not yet attached."""
        return self

    def __exit__(self, *problem: object) -> None:
        """Detaches whatever is attached."""
        self.detach()

    @property
    def device(self) -> str:
        """The block device."""
        return self._loop

    def attach(self) -> None:
        """Makes the block device."""
        self._server = subprocess.Popen(
            ["nbdfuse", str(self.fuse), self.uri],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until("nbdfuse serves its file", (self.fuse / "nbd").exists)
        self._loop = run(["losetup", "--find", "--show", self.fuse / "nbd"]).stdout.strip()

    def make_filesystem(self) -> None:
        """An empty ext4 on the device."""
        run(["mkfs.ext4", "-q", "-F", self._loop])

    def mount(self) -> None:
        """Mounts it, replaying its journal."""
        run(["mount", self._loop, self.top])

    def unmount(self) -> None:
        """Unmounts it and checks the filesystem: it must be clean."""
        run(["umount", self.top])
        checked = run(["e2fsck", "-fn", self._loop], expect=None)
        assert checked.returncode == 0, checked.stdout + checked.stderr

    def detach(self) -> None:
        """Takes everything apart, whatever state it is in."""
        run(["umount", "-l", self.top], expect=None)
        if self._loop:
            run(["losetup", "-d", self._loop], expect=None)
            self._loop = ""
        run(["umount", "-l", self.fuse], expect=None)
        if self._server is not None:
            try:
                self._server.wait(10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait(10)
            self._server = None
