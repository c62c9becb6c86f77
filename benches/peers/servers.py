"""The NBD servers that are compared: ours and the stock ones, each serving a file in memory."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.e2e.harness import Pair, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    Server = Callable[[int, Path], AbstractContextManager[str]]

MEMORY = "/dev/shm"


@contextmanager
def _serving(command: list[str], uri: str) -> Iterator[str]:
    """Runs a server until the block ends; waits until it answers."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while run(["nbdinfo", "--size", uri], expect=None).returncode != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{command[0]} does not answer at {uri}")
            time.sleep(0.05)
        yield uri
    finally:
        process.terminate()
        process.wait(10)


def _file(size: int, directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(b"\x5a" * size)
    return path


@contextmanager
def nbdkit(size: int, directory: Path) -> Iterator[str]:
    """nbdkit's file plugin."""
    path, socket = _file(size, directory), directory / "nbdkit.sock"
    command = [
        "nbdkit",
        "--foreground",
        "--exit-with-parent",
        f"--unix={socket}",
        "file",
        str(path),
    ]
    with _serving(command, f"nbd+unix:///?socket={socket}") as uri:
        yield uri


@contextmanager
def qemu_nbd(size: int, directory: Path) -> Iterator[str]:
    """qemu-nbd on a raw file."""
    path, socket = _file(size, directory), directory / "qemu.sock"
    command = ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-x", "v", "-k", str(socket), str(path)]
    with _serving(command, f"nbd+unix:///v?socket={socket}") as uri:
        yield uri


@contextmanager
def dualrestore_mirrored(size: int, directory: Path) -> Iterator[str]:
    """Our primary; it mirrors every write to a second process as well, which no peer does."""
    image = _file(size, directory)
    with Pair(size, place=MEMORY) as pair:
        run(["nbdcopy", image, pair.uri])
        pair.wait_mirrored()
        yield pair.uri


SERVERS: dict[str, Server] = {
    "dualrestore": dualrestore_mirrored,
    "nbdkit": nbdkit,
    "qemu-nbd": qemu_nbd,
}
