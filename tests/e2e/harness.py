"""Two daemons in a scratch directory, started, killed and asked as a user would.

Guarantees: every wait has a deadline; everything that was started is ended by `close`.
Does not know: the package's insides. It is used through its command line and its sockets only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.cable import Cable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from tests.e2e.machines import Machines

MIB = 1 << 20
VOLUME = "v"
START_SECONDS = 20.0
STOP_SECONDS = 20.0
COMMAND_SECONDS = 120.0
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
PROGRAM = Path(sys.executable).parent / "dualrestore"


class CommandError(AssertionError):
    """A program ended with an exit code that was not expected."""


def run(
    command: Sequence[str | Path], *, expect: int | None = 0, seconds: float = COMMAND_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end; `expect` is its exit code, None for any."""
    words = [str(word) for word in command]
    finished = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
    )
    if expect is not None and finished.returncode != expect:
        raise CommandError(
            f"{' '.join(words)}\nexit code {finished.returncode}, expected {expect}\n"
            f"--- stdout\n{finished.stdout}\n--- stderr\n{finished.stderr}"
        )
    return finished


def dualrestore(*words: str | Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Runs one verb of the command line."""
    return run([PROGRAM, *words], expect=expect)


def wait_until(what: str, holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Asks until it holds; fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def garbage(path: Path, size: int) -> None:
    """Overwrites the file with random bytes: a lost disk reads as anything."""
    with path.open("r+b" if path.exists() else "wb") as file:
        for begin in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - begin)))
        file.truncate(size)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two files are equal byte by byte."""
    return run(["cmp", "-s", one, other], expect=None).returncode == 0


class Daemon:
    """One `dualrestore serve` and its configuration file."""

    def __init__(self, configuration: Path) -> None:
        self.configuration = configuration
        self.inside: list[str] = []
        """What puts a process into its machine, if it has one of its own."""
        self.log = configuration.with_suffix(".log")
        self.control = configuration.with_suffix(".ctl")
        self.process: subprocess.Popen[bytes] | None = None

    def verb(self, *words: str | Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Runs a verb that speaks to this daemon."""
        return dualrestore("-c", self.configuration, *words, expect=expect)

    def verb_json(self, *words: str | Path, expect: int = 0) -> dict[str, Any]:
        """Runs a verb with `--json` and returns what it printed."""
        printed: dict[str, Any] = json.loads(self.verb(*words, "--json", expect=expect).stdout)
        return printed

    def launch(self) -> None:
        """Starts the process without waiting for it. It dies with us, however we die."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.inside, *DIES_WITH_US, PROGRAM, "serve", "-c", self.configuration],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        """Starts the process and waits until it answers."""
        self.launch()
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            if not self.alive or time.monotonic() > deadline:
                raise AssertionError(f"{self.configuration.name} does not serve:\n{self.words()}")
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether somebody accepts at its control socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            return client.connect_ex(str(self.control)) == 0

    def ask(self, path: str) -> Any:
        """What its control API answers."""
        connection = http.client.HTTPConnection("localhost", timeout=COMMAND_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(connection):
            connection.sock.settimeout(COMMAND_SECONDS)
            connection.sock.connect(str(self.control))
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())

    def raw(self, path: str, *, until: bytes | None = None) -> bytes:
        """The body of an answer; of one without an end, as far as the line after `until`."""
        connection = http.client.HTTPConnection("localhost", timeout=COMMAND_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.closing(connection):
            connection.sock.settimeout(COMMAND_SECONDS)
            connection.sock.connect(str(self.control))
            connection.request("GET", path)
            response = connection.getresponse()
            if until is None:
                return response.read()
            received = b""
            while until not in received:
                line = response.readline()
                assert line, f"the answer ended without {until!r}"
                received += line
            return received + response.readline()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process is not None and self.process.poll() is None

    def words(self) -> str:
        """What it wrote to its log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        """Asks it to end (SIGTERM), as systemd would; it must do so cleanly."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(STOP_SECONDS)
        self.process = None
        assert code in {0, 143}, f"ended with {code}:\n{self.words()}"

    def kill(self) -> None:
        """Kills it (SIGKILL)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def status(self) -> dict[str, Any]:
        """The status of the one volume it holds."""
        chosen = self.ask(f"/v1/volumes/{VOLUME}")
        assert isinstance(chosen, dict)
        return chosen


class Pair:
    """A primary and a backup of one volume, as two daemons on this machine."""

    def __init__(
        self,
        size: int,
        *,
        mirror: str = "flush",
        more: str = "",
        place: str = "/var/tmp",
        cabled: bool = False,
    ) -> None:
        self.size = size
        self.directory = Path(tempfile.mkdtemp(prefix="dr-", dir=place))
        self.primary_device = self.directory / "primary.img"
        self.mirror_device = self.directory / "mirror.img"
        self.socket = self.directory / "p.sock"
        self.backup_socket = self.directory / "b.sock"
        self.port = free_port()
        self.link_port = free_port()
        self._cable = Cable(self.link_port) if cabled else None
        dialled = self._cable.port if self._cable else self.link_port
        self.backup = self._daemon(
            "backup",
            f'listen = "127.0.0.1:{self.link_port}"',
            f'role = "backup"\ndevice = "{self.mirror_device}"\n'
            f'export = ["unix:{self.backup_socket}"]',
        )
        self.primary = self._daemon(
            "primary",
            "",
            f'role = "primary"\ndevice = "{self.primary_device}"\nmirror = "{mirror}"\n'
            f'backups = ["127.0.0.1:{dialled}/{VOLUME}"]\n'
            f'export = ["unix:{self.socket}", "tcp:127.0.0.1:{self.port}"]\n{more}',
        )

    def _daemon(self, role: str, node: str, volume: str) -> Daemon:
        configuration = self.directory / f"{role}.toml"
        state = self.directory / f"{role}-state"
        state.mkdir()
        configuration.write_text(
            f'[node]\nstate = "{state}"\ncontrol = "{self.directory}/{role}.ctl"\n{node}\n\n'
            f'[volume.{VOLUME}]\nsize = "{self.size}"\n{volume}\n'
        )
        return Daemon(configuration)

    def __enter__(self) -> Pair:
        """Starts both."""
        try:
            self.backup.start()
            self.primary.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends both; after a failure their logs are shown."""
        if kind is not None:
            for daemon in (self.primary, self.backup):
                print(f"--- {daemon.log.name}\n{daemon.words()[-8000:]}")
        self.close()

    def close(self) -> None:
        """Kills what runs and removes everything."""
        self.primary.kill()
        self.backup.kill()
        if self._cable is not None:
            self._cable.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def move_to(self, machines: Machines) -> None:
        """From the loopback to two machines with addresses of their own."""
        primary, backup = machines.both
        for daemon, machine in ((self.primary, primary), (self.backup, backup)):
            daemon.inside = machine.inside
            text = daemon.configuration.read_text()
            text = text.replace(f"127.0.0.1:{self.link_port}", f"{backup.address}:{self.link_port}")
            text = text.replace(f"127.0.0.1:{self.port}", f"{primary.address}:{self.port}")
            daemon.configuration.write_text(text)

    @property
    def cable(self) -> Cable:
        """What the link goes through; of a pair that was made with `cabled`."""
        assert self._cable is not None
        return self._cable

    @property
    def uri(self) -> str:
        """The primary's export, for stock clients."""
        return f"nbd+unix:///{VOLUME}?socket={self.socket}"

    @property
    def tcp_uri(self) -> str:
        """The same over TCP."""
        return f"nbd://127.0.0.1:{self.port}/{VOLUME}"

    def snapshot_uri(self, snapshot: str) -> str:
        """The backup's export of a snapshot."""
        return f"nbd+unix:///{VOLUME}@{snapshot}?socket={self.backup_socket}"

    def lose_disk(self) -> None:
        """Stops the primary, fills its device with garbage, starts it, declares the loss."""
        self.primary.stop()
        garbage(self.primary_device, self.size)
        self.primary.start()
        self.primary.verb("restore", VOLUME, "--lost", "all")

    def snapshot(self) -> str:
        """Cuts a snapshot through the primary; its identifier."""
        return str(self.primary.verb_json("snapshot", VOLUME)["snapshot"])

    def bundle(self, snapshot: str, name: str = "bundle") -> Path:
        """Writes the snapshot as a bundle on the backup's side."""
        medium = self.directory / name
        self.backup.verb("bundle", "create", f"{VOLUME}@{snapshot}", "--to", medium)
        return medium

    def merge(self, bundle: Path) -> dict[str, Any]:
        """Merges the bundle into the live volume; the report."""
        return self.primary.verb_json("merge", bundle, VOLUME)

    def wait_mirrored(self, seconds: float = 60.0) -> None:
        """Waits until the primary says that it is mirrored; then `verify` must find it so."""
        deadline = time.monotonic() + seconds
        while not (status := self.primary.status())["mirrored"]:
            assert time.monotonic() < deadline, f"not mirrored within {seconds} s: {status}"
            time.sleep(0.02)
        assert (status["missing_bytes"], status["unsent_bytes"]) == (0, 0), status
        self.primary.verb("verify", VOLUME)

    def stop_and_compare(self) -> None:
        """Ends both daemons as systemd would; then both devices must be equal byte by byte."""
        self.primary.stop()
        self.backup.stop()
        assert same_bytes(self.primary_device, self.mirror_device), "the two sides differ"
