"""Speaks to a daemon: HTTP over its Unix socket, with the standard library.

Guarantees: an error that the daemon tells is raised as the same class here; a daemon that does
not answer is a `LinkError` that says how to start one.
"""

import http.client
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualrestore.errors import LinkError, error_from

TIMEOUT_SECONDS = 120.0
"""Silence of the daemon. Jobs speak every second; a snapshot may take its whole minute."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DaemonClient:
    """The daemon behind one control socket."""

    def __init__(self, control: Path) -> None:
        self.control = control

    def _request(
        self, method: str, path: str, body: object | None
    ) -> tuple[_UnixConnection, http.client.HTTPResponse]:
        connection = _UnixConnection(self.control)
        encoded = None if body is None else json.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        try:
            connection.request(method, path, encoded, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as problem:
            connection.close()
            raise self._unreachable(problem) from problem
        if response.status >= 400:
            try:
                told = json.loads(response.read() or b"{}")
            except ValueError:
                told = {}
            connection.close()
            error = told.get("error") if isinstance(told, dict) else None
            if not isinstance(error, dict):
                raise LinkError(
                    f"{self.control}: expected a dualrestore daemon, found an answer with status "
                    f"{response.status}"
                )
            raise error_from(error)
        return connection, response

    def _unreachable(self, problem: Exception) -> LinkError:
        words = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        return LinkError(
            f"{self.control}: no daemon answers ({words}); start it with `dualrestore serve`"
        )

    def call(self, method: str, path: str, body: object | None = None) -> Any:
        """One request, one document."""
        connection, response = self._request(method, path, body)
        try:
            return json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as problem:
            raise self._unreachable(problem) from problem
        finally:
            connection.close()

    def job(
        self, path: str, body: object, progress: Callable[[dict[str, int]], None] | None = None
    ) -> Any:
        """Starts a job, relays its progress, returns its report. Leaving early ends the job."""
        connection, response = self._request("POST", path, body)
        try:
            while line := response.readline():
                told = json.loads(line)
                if "report" in told:
                    return told["report"]
                if "error" in told:
                    raise error_from(told["error"])
                if progress is not None and told.get("progress"):
                    progress(told["progress"])
        except (ConnectionError, http.client.HTTPException, json.JSONDecodeError) as problem:
            if isinstance(problem, LinkError):
                raise
            raise self._unreachable(problem) from problem
        finally:
            connection.close()
        raise LinkError(f"{self.control}: the daemon stopped in the middle of the job")
