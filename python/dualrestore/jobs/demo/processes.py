"""The processes of the demo: daemons and the workload.

Guarantees: what was started is ended, by its own handle, whatever happens. Does not know: why.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualrestore.config import Address
from dualrestore.errors import DualRestoreError, LinkError
from dualrestore.jobs.demo.workload import Options
from dualrestore.transport.control_client import DaemonClient
from dualrestore.transport.sockets import listen_tcp

START_SECONDS = 20.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02


def free_address() -> Address:
    """A port of loopback that nobody listens at now."""
    with listen_tcp(Address("127.0.0.1", 0)) as listener:
        return Address("127.0.0.1", listener.getsockname()[1])


class Daemon:
    """One `dualrestore serve`."""

    def __init__(self, name: str, place: Path, sockets: Path, configuration: str) -> None:
        self.name = name
        self.control = sockets / f"{name}.sock"
        self.client = DaemonClient(self.control)
        self.rss_bytes = 0
        """The most memory that it had."""
        self._file = place / f"{name}.toml"
        self._log = place / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        node = f'[node]\nstate = "{place / name}"\ncontrol = "{self.control}"\n'
        self._file.write_text(node + configuration, "utf-8")

    def start(self) -> None:
        """Returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dualrestore", "serve", "-c", str(self._file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client.call("GET", "/v1/status")
            except LinkError as problem:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise DualRestoreError(
                        f"the {self.name} daemon did not start: {self._last_words()}"
                    ) from problem
                time.sleep(POLL_SECONDS)
            else:
                return

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").splitlines()
        return lines[-1] if lines else "it said nothing"

    def status(self) -> dict[str, Any]:
        """Of its one volume."""
        document: dict[str, Any] = self.client.call("GET", "/v1/volumes/demo")
        return document

    def _note_memory(self) -> None:
        assert self._process is not None
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text("ascii").splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("VmHWM:"):
                self.rss_bytes = max(self.rss_bytes, int(line.split()[1]) * 1024)

    def stop(self, *, insist: bool = True) -> None:
        """Asks it to end (SIGTERM) and waits. `insist`: anything but a clean end is an error."""
        process = self._process
        if process is None:
            return
        self._note_memory()
        self._process = None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if insist and code:
            raise DualRestoreError(
                f"expected the {self.name} daemon to end cleanly, found exit code {code}: "
                f"{self._last_words()}"
            )


class WorkloadProcess:
    """The workload, seen from outside."""

    def __init__(self, options: Options) -> None:
        self.counters: dict[str, Any] = {}
        self.final: dict[str, Any] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dualrestore.jobs.demo.workload"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(options)) + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self.counters = told.get("counters") or told.get("final") or {}
            self.final = told.get("final")

    @property
    def failure(self) -> str | None:
        """Why it does not work any more, if so."""
        if self.counters.get("errors"):
            return str(self.counters["errors"][0])
        if self._process.poll() is not None and self.final is None:
            return f"it ended with code {self._process.returncode}"
        return None

    def stop(self) -> dict[str, Any]:
        """Lets it finish; returns its counters."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("stop\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        self._reader.join(STOP_SECONDS)
        self._process.wait(STOP_SECONDS)
        if self.final is None:
            raise DualRestoreError(f"the workload did not finish: {self.failure}")
        return self.final

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
