"""Speaking to a daemon."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dualrestore.errors import BusyError, LinkError
from dualrestore.transport.control_client import DaemonClient


@contextmanager
def daemon(path: Path, answer: bytes) -> Iterator[DaemonClient]:
    """Answers one request with these bytes and closes."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                request = client.makefile("rb")
                length = 0
                while (line := request.readline().strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                request.read(length)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield DaemonClient(path)
        thread.join()


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def test_a_document_is_returned(tmp_path: Path) -> None:
    with daemon(tmp_path / "s", http(b'{"a": [1]}')) as client:
        assert client.call("GET", "/v1/status") == {"a": [1]}


def test_an_error_of_the_daemon_is_raised_as_its_class(tmp_path: Path) -> None:
    body = b'{"error": {"kind": "BusyError", "message": "in use"}}'
    with (
        daemon(tmp_path / "s", http(body, "409 Conflict")) as client,
        pytest.raises(BusyError, match="in use"),
    ):
        client.call("POST", "/v1/volumes/v/snapshot", {})


def test_a_job_relays_progress_and_returns_its_report(tmp_path: Path) -> None:
    body = b'{"progress": {}}\n{"progress": {"done_bytes": 5}}\n{"report": {"x": 1}}\n'
    seen: list[dict[str, int]] = []
    with daemon(tmp_path / "s", http(body)) as client:
        assert client.job("/v1/volumes/v/merge", {}, seen.append) == {"x": 1}
    assert seen == [{"done_bytes": 5}]


def test_a_failed_job_raises(tmp_path: Path) -> None:
    body = b'{"error": {"kind": "BusyError", "message": "in use"}}\n'
    with daemon(tmp_path / "s", http(body)) as client, pytest.raises(BusyError):
        client.job("/v1/volumes/v/merge", {})


@pytest.mark.parametrize(
    "answer",
    [
        http(b'{"progress": {}}\n'),
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{",
        b"",
        b"nonsense\r\n\r\n",
        http(b"<html>", "502 Bad Gateway"),
    ],
)
def test_a_daemon_that_stops_in_the_middle_is_a_lost_link(tmp_path: Path, answer: bytes) -> None:
    with daemon(tmp_path / "s", answer) as client, pytest.raises(LinkError):
        client.job("/v1/volumes/v/merge", {})


def test_a_daemon_that_is_not_there_is_a_lost_link(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="dualrestore serve"):
        DaemonClient(tmp_path / "none").call("GET", "/v1/status")
