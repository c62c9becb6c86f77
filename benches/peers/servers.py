"""The NBD servers that are compared: ours and the stock ones, each serving one file.

Does not know: what is measured.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.e2e.harness import DIES_WITH_US, Daemon, Pair, free_port, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    Opening = Callable[["Place"], AbstractContextManager["Serving"]]

MEMORY = "/dev/shm"
DISK = "/var/tmp"
EXPORT = "v"


class Place(NamedTuple):
    """Where and how to serve: an empty directory, bytes of the file, past the page cache or not,
    and a directory of certificates if over TLS."""

    directory: Path
    size: int
    direct: bool = False
    tls: Path | None = None

    @property
    def file(self) -> Path:
        """What is served."""
        return self.directory / "disk.img"

    @property
    def socket(self) -> Path:
        """Where, if not over TLS."""
        return self.directory / "nbd.sock"

    def fill(self) -> None:
        """Makes the file, all of it written."""
        piece = os.urandom(1 << 20)
        with self.file.open("wb") as file:
            for _ in range(0, self.size, len(piece)):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())


class Serving(NamedTuple):
    """A server at work."""

    uri: str
    process: int

    def cpu_seconds(self) -> float:
        """What it has used so far, and those of its children that have ended."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """What it holds of memory that is its own."""
        lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


def tls_uri(port: int, pki: Path, name: str = EXPORT) -> str:
    """Over TLS on this machine, with the client's certificate."""
    return f"nbds://localhost:{port}/{name}?tls-certificates={pki}"


@contextmanager
def _serving(command: list[str], uri: str) -> Iterator[Serving]:
    """Runs a server until the block ends; waits until it answers."""
    process = subprocess.Popen(
        [*DIES_WITH_US, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 10
        while run(["nbdinfo", "--size", uri], expect=None).returncode != 0:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{command[0]} does not answer at {uri}")
            time.sleep(0.05)
        yield Serving(uri, process.pid)
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def nbdkit(place: Place) -> Iterator[Serving]:
    """nbdkit's file plugin, which knows no direct I/O."""
    place.fill()
    command = ["nbdkit", "--foreground"]
    if place.tls is None:
        command.append(f"--unix={place.socket}")
        uri = f"nbd+unix:///?socket={place.socket}"
    else:
        port = free_port()
        command += [f"--port={port}", "--tls=require", "--tls-verify-peer"]
        command.append(f"--tls-certificates={place.tls}")
        uri = tls_uri(port, place.tls, "")
    with _serving([*command, "file", str(place.file)], uri) as serving:
        yield serving


@contextmanager
def qemu_nbd(place: Place) -> Iterator[Serving]:
    """qemu-nbd on a raw file."""
    place.fill()
    command = ["qemu-nbd", "-f", "raw", "-t", "-e", "16", "-x", EXPORT]
    if place.direct:
        command += ["--cache=none", "--aio=io_uring"]
    if place.tls is None:
        command += ["-k", str(place.socket)]
        uri = f"nbd+unix:///{EXPORT}?socket={place.socket}"
    else:
        port = free_port()
        # qemu-nbd begins its own certificate's checks only with a client's.
        credentials = f"tls-creds-x509,id=tls0,endpoint=server,dir={place.tls},verify-peer=yes"
        command += ["--object", credentials, "--tls-creds=tls0", "-p", str(port)]
        uri = tls_uri(port, place.tls)
    with _serving([*command, str(place.file)], uri) as serving:
        yield serving


@contextmanager
def nbd_server(place: Place) -> Iterator[Serving]:
    """The reference implementation's server, which serves each connection with a process."""
    place.fill()
    configuration, number = place.directory / "nbd-server.conf", place.directory / "pid"
    configuration.write_text(
        f"[generic]\nunixsock = {place.socket}\nport = {free_port()}\n"
        f"[{EXPORT}]\nexportname = {place.file}\n"
    )
    # In the foreground it would serve one connection at a time.
    run(["nbd-server", "-C", configuration, "-p", number])
    wait_until("nbd-server runs", lambda: number.exists() and bool(number.read_text().strip()))
    process = int(number.read_text())
    try:
        yield Serving(f"nbd+unix:///{EXPORT}?socket={place.socket}", process)
    finally:
        os.kill(process, signal.SIGTERM)


@contextmanager
def dualrestore(place: Place) -> Iterator[Serving]:
    """Our primary, whose backup is away: everything is current, nothing is mirrored."""
    place.fill()
    direct = f"direct = {str(place.direct).lower()}"
    pair = Pair(place.size, place=str(place.directory), more=direct)
    try:
        _set_place(pair.primary, place, pair)
        pair.primary.start()
        pair.primary.verb("restore", EXPORT, "--lost", "none")
        assert pair.primary.process is not None
        uri = pair.uri if place.tls is None else tls_uri(pair.port, place.tls)
        yield Serving(uri, pair.primary.process.pid)
        pair.primary.stop()
    finally:
        pair.close()


def _set_place(daemon: Daemon, place: Place, pair: Pair) -> None:
    text = daemon.configuration.read_text()
    text = text.replace(str(pair.primary_device), str(place.file))
    if place.tls is not None:
        text = text.replace("[node]\n", f'[node]\ntls = "{place.tls}"\n')
        text = text.replace(f"tcp:127.0.0.1:{pair.port}", f"tcp:0.0.0.0:{pair.port}")
    daemon.configuration.write_text(text)


@contextmanager
def mirrored(place: Place, policy: str) -> Iterator[Serving]:
    """Our primary with a backup on this machine."""
    with Pair(place.size, place=str(place.directory), mirror=policy) as pair:
        place.fill()
        run(["nbdcopy", place.file, pair.uri])
        place.file.unlink()
        pair.wait_mirrored()
        assert pair.primary.process is not None
        yield Serving(pair.uri, pair.primary.process.pid)


OURS = "dualrestore"
SERVERS: dict[str, Opening] = {
    OURS: dualrestore,
    "nbdkit": nbdkit,
    "qemu-nbd": qemu_nbd,
    "nbd-server": nbd_server,
}
