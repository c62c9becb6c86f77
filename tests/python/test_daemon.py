"""A daemon with a backup and a primary in one process, asked over its control socket."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualrestore.config import UnixExport
from dualrestore.errors import BusyError, UsageError
from dualrestore.model import NodeStatus, PrimaryStatus, read
from dualrestore.transport.control_client import DaemonClient
from dualrestore.transport.nbd_client import NbdClient

SIZE = 16 << 20
SECONDS = 30.0


class Daemon:
    """The process, its client and where its things are."""

    def __init__(self, place: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.place = place
        self.export = UnixExport(place / "v.sock")
        self.file = place / "node.toml"
        self.file.write_text(
            f"""
            [node]
            state = "{place}/state"
            control = "{place}/control"
            listen = "127.0.0.1:{port}"
            [volume.v]
            role = "primary"
            device = "{place}/primary.img"
            size = "16MiB"
            backups = ["127.0.0.1:{port}/far"]
            export = ["unix:{self.export.path}"]
            [volume.far]
            role = "backup"
            device = "{place}/mirror.img"
            size = "16MiB"
            export = ["unix:{place}/far.sock"]
            """
        )
        self.client = DaemonClient(place / "control")
        self.log = place / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dualrestore", "serve", "-c", str(self.file)],
                stdout=log,
                stderr=log,
            )

    def await_mirrored(self) -> None:
        until = time.monotonic() + SECONDS
        while True:
            try:
                if self.client.call("GET", "/v1/volumes/v")["mirrored"]:
                    return
            except ConnectionError:
                assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def raw(self, method: str, path: str, body: bytes | None = None) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("localhost", timeout=SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(SECONDS)
        connection.sock.connect(str(self.client.control))
        connection.request(method, path, body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("daemon"))
    try:
        running.await_mirrored()
        yield running
    finally:
        running.process.send_signal(signal.SIGTERM)
        code = running.process.wait(SECONDS)
    assert code == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()
    assert not list(running.place.glob("*.sock")), "sockets are removed"


def test_two_empty_devices_of_ours_are_mirrored_without_a_word(daemon: Daemon) -> None:
    status = read(NodeStatus, daemon.client.call("GET", "/v1/status"))
    primary, backup = status.typed_volumes()
    assert isinstance(primary, PrimaryStatus)
    assert (primary.state, primary.missing_bytes, primary.unsent_bytes) == ("mirrored", 0, 0)
    assert (backup.role, backup.size) == ("backup", SIZE)


def test_what_is_written_is_compared_same_on_both_sides(daemon: Daemon) -> None:
    with NbdClient(daemon.export, "v") as client:
        assert client.size == SIZE
        client.write(1 << 20, b"x" * 8192)
        client.flush()
        assert client.read((1 << 20) - 4096, 16384) == bytes(4096) + b"x" * 8192 + bytes(4096)
    daemon.await_mirrored()
    report = daemon.client.job("/v1/volumes/v/verify", {})
    assert (report["bytes_compared"], report["bytes_different"]) == (SIZE, 0)


def test_a_snapshot_is_listed_exported_bundled_and_deleted(daemon: Daemon) -> None:
    with NbdClient(daemon.export, "v") as client:
        client.write(0, b"before".ljust(4096))
    cut = daemon.client.call("POST", "/v1/volumes/v/snapshot", {"label": "a"})["snapshot"]
    with NbdClient(daemon.export, "v") as client:
        client.write(0, b"after".ljust(4096))
        client.flush()
    listed = daemon.client.call("GET", "/v1/volumes/far/snapshots")
    assert [(one["snapshot"], one["label"]) for one in listed] == [(cut, "a")]
    far = UnixExport(daemon.place / "far.sock")
    with NbdClient(far, f"far@{cut}") as client:
        assert client.read(0, 4096) == b"before".ljust(4096)
    target = daemon.place / "out.drb"
    seen: list[dict[str, int]] = []
    report = daemon.client.job(
        "/v1/volumes/far/bundle", {"snapshot": cut, "media": [str(target)]}, seen.append
    )
    assert report["bytes_selected"] == SIZE
    daemon.client.call("DELETE", f"/v1/volumes/far/snapshots/{cut}")
    assert daemon.client.call("GET", "/v1/volumes/far/snapshots") == []
    with pytest.raises(OSError, match="refused"):
        NbdClient(far, f"far@{cut}")


def test_merging_into_a_whole_volume_writes_nothing(daemon: Daemon) -> None:
    cut = daemon.client.call("POST", "/v1/volumes/v/snapshot", {})["snapshot"]
    target = daemon.place / "whole.drb"
    daemon.client.job("/v1/volumes/far/bundle", {"snapshot": cut, "media": [str(target)]})
    report = daemon.client.job("/v1/volumes/v/merge", {"sources": [str(target)]})
    assert (report["bytes_written"], report["bytes_skipped"]) == (0, SIZE)
    daemon.client.call("DELETE", f"/v1/volumes/far/snapshots/{cut}")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/v1/volumes/none", None, 400),
        ("POST", "/v1/volumes/none/restore", {"lost": "all"}, 400),
        ("POST", "/v1/volumes/far/restore", {"lost": "all"}, 400),
        ("POST", "/v1/volumes/v/restore", {"lost": "some"}, 400),
        ("POST", "/v1/volumes/v/restore", {"lost": [[0, SIZE + 512]]}, 400),
        ("POST", "/v1/volumes/v/restore", {"lost": "none", "extra": 1}, 400),
        ("POST", "/v1/volumes/v/restore", "nonsense", 400),
        ("POST", "/v1/volumes/v/snapshot", {"label": "x" * 201}, 400),
        ("POST", "/v1/volumes/v/snapshot", {"selection": [[0, SIZE * 2]]}, 400),
        ("POST", "/v1/volumes/v/merge", {"sources": ["relative"]}, 400),
        ("POST", "/v1/volumes/v/merge", {"sources": []}, 400),
        ("GET", "/v1/volumes/v/map/nonsense", None, 400),
        ("GET", "/v1/volumes/v/picture?cells=0", None, 400),
        ("GET", "/v1/nonsense", None, 404),
        ("PUT", "/v1/status", None, 405),
    ],
)
def test_a_wrong_request_is_refused_and_changes_nothing(
    daemon: Daemon, method: str, path: str, body: object, status: int
) -> None:
    before = daemon.client.call("GET", "/v1/volumes/v")["generation"]
    found, _, content = daemon.raw(method, path, json.dumps(body).encode() if body else None)
    assert found == status
    if status == 400:
        error = json.loads(content)["error"]
        assert "expected" in error["message"]
    assert daemon.client.call("GET", "/v1/volumes/v")["generation"] == before


def test_a_huge_request_is_refused(daemon: Daemon) -> None:
    body = b'{"lost": "' + b"x" * (5 << 20) + b'"}'
    try:
        status, _, _ = daemon.raw("POST", "/v1/volumes/v/restore", body)
    except ConnectionError:
        return
    assert status == 400


def test_the_map_is_told_as_extents_and_as_a_picture(daemon: Daemon) -> None:
    assert daemon.client.call("GET", "/v1/volumes/v/map/current") == [[0, SIZE]]
    assert daemon.client.call("GET", "/v1/volumes/v/map/missing") == []
    assert daemon.client.call("GET", "/v1/volumes/v/picture?cells=4") == [SIZE // 4] * 4


def test_metrics_name_every_volume(daemon: Daemon) -> None:
    _, headers, content = daemon.raw("GET", "/metrics")
    text = content.decode()
    assert headers["content-type"].startswith("text/plain")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(figures['dualrestore_current_bytes{role="primary",volume="v"}']) == SIZE
    assert 'dualrestore_volume_bytes{role="backup",volume="far"}' in text
    assert "dualrestore_link_sent_bytes_total" in text


def test_the_page_runs_nothing_that_is_not_its_own(daemon: Daemon) -> None:
    status, headers, content = daemon.raw("GET", "/")
    assert status == 200
    assert b"<script src=" in content
    assert content.count(b"<script") == 1
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/page.js", "/page.css"):
        assert daemon.raw("GET", path)[0] == 200
    assert b"innerHTML" not in daemon.raw("GET", "/page.js")[2]


def test_the_page_is_told_what_changes(daemon: Daemon) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(daemon.client.control))
        client.sendall(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n")
        received = b""
        while received.count(b"data: ") < 2:
            received += client.recv(65536)
    assert b"text/event-stream" in received


def test_the_control_socket_is_for_its_owner_only(daemon: Daemon) -> None:
    assert daemon.client.control.stat().st_mode & 0o777 == 0o600


def test_a_second_daemon_of_the_same_state_is_refused(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dualrestore", "serve", "-c", str(daemon.file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == BusyError.exit_code
    assert "only daemon" in done.stderr
    assert daemon.client.call("GET", "/v1/status")["version"]


def test_a_failed_job_is_remembered_with_its_reason(daemon: Daemon) -> None:
    with pytest.raises(UsageError):
        daemon.client.job("/v1/volumes/v/merge", {"sources": [str(daemon.place / "nothing")]})
    jobs = read(NodeStatus, daemon.client.call("GET", "/v1/status")).jobs
    assert jobs[-1].state == "failed"
    assert "expected a bundle" in (jobs[-1].error or "")


def test_unknown_volumes_are_named_with_the_known_ones(daemon: Daemon) -> None:
    with pytest.raises(UsageError, match=r"\(v, far\)"):
        daemon.client.call("POST", "/v1/volumes/x/snapshot", {})
