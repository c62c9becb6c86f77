"""A whole daemon, looked at from outside: what it gave up, whom it hears, what it lets be seen.

Elsewhere: who is let in by which door (`tests/python/test_nobody_let_in.py`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.e2e.harness import MIB, Daemon, Pair, run, wait_until
from tests.e2e.pki import set_tls, write_pki

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

SIZE = 16 * MIB
NOBODY = 65534
CROWD = 100
LINK_CROWD = 300
END_SECONDS = 5.0
CORE_BYTES = 1000448
RSS_GROWTH_MAX = 96 * MIB
"""Of hundreds of clients that never finish a handshake at most 100 are held at a time, with 256 KiB
of buffers each and what TLS needs."""


def process_of(daemon: Daemon) -> Path:
    """Its directory in /proc."""
    assert daemon.process is not None
    return Path(f"/proc/{daemon.process.pid}")


def fields(daemon: Daemon) -> dict[str, str]:
    """What the kernel says of the process."""
    lines = (process_of(daemon) / "status").read_text().splitlines()
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines)}


def resident_bytes(daemon: Daemon) -> int:
    """Its memory."""
    return int(fields(daemon)["VmRSS"].split()[0]) * 1024


@pytest.fixture
def closed() -> Iterator[Pair]:
    """A pair over TLS, with an NBD export that others can reach."""
    pair = Pair(SIZE)
    try:
        authority = trustme.CA()
        pki = write_pki(pair.directory / "pki", authority, authority)
        text = pair.primary.configuration.read_text()
        text = text.replace(f"tcp:127.0.0.1:{pair.port}", f"tcp:0.0.0.0:{pair.port}")
        pair.primary.configuration.write_text(text)
        for daemon in (pair.primary, pair.backup):
            set_tls(daemon, pki)
            daemon.inside = ["prlimit", f"--core={CORE_BYTES}"]
        with pair:
            yield pair
    finally:
        pair.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Pair]:
    """A pair that is only looked at."""
    with Pair(SIZE) as running:
        yield running


TLS_BEGUN = bytes.fromhex("16030102000100")
"""Of a ClientHello, which does not go on."""
STARTTLS = b"\0\0\0\3IHAVEOPT\0\0\0\5\0\0\0\0"


def come(port: int, first: bytes) -> socket.socket:
    """A client that says this and no more."""
    client = socket.create_connection(("127.0.0.1", port), 10)
    client.sendall(first)
    return client


def test_a_crowd_costs_bounded_memory_keeps_nobody_out_and_does_not_hinder_the_end(
    closed: Pair,
) -> None:
    closed.wait_mirrored()
    before = [resident_bytes(daemon) for daemon in (closed.primary, closed.backup)]
    crowd = [come(closed.link_port, first) for first in (b"", TLS_BEGUN) * LINK_CROWD]
    try:
        # Whoever has a certificate comes through it.
        closed.primary.kill()
        closed.primary.start()
        closed.wait_mirrored()
        for _ in range(CROWD):
            crowd.append(come(closed.port, STARTTLS + TLS_BEGUN))
            idle = socket.socket(socket.AF_UNIX)
            idle.connect(str(closed.socket))
            crowd.append(idle)
        wait_until("all are taken", lambda: closed.primary.status()["connections"] >= CROWD)
        after = [resident_bytes(daemon) for daemon in (closed.primary, closed.backup)]
        grown = [now - then for now, then in zip(after, before, strict=True)]
        assert max(grown) < RSS_GROWTH_MAX, grown
        for daemon in (closed.primary, closed.backup):
            assert daemon.process is not None
            daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(END_SECONDS) == 0
    finally:
        for client in crowd:
            client.close()


def test_the_process_ignores_what_would_end_it_and_gave_up_what_it_does_not_need(
    shared: Pair,
) -> None:
    for daemon in (shared.primary, shared.backup):
        found = fields(daemon)
        ignored = int(found["SigIgn"], 16)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            assert ignored >> (number - 1) & 1, number.name
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
        tasks = (process_of(daemon) / "task").iterdir()
        filters = {re.findall(r"Seccomp_filters:\s*(\d+)", (task / "status").read_text())[0]
                   for task in tasks}  # fmt: skip
        assert filters == {"1"}, "a thread has no filter"


def test_a_daemon_with_keys_writes_no_core_dump(closed: Pair) -> None:
    for daemon in (closed.primary, closed.backup):
        limits = (process_of(daemon) / "limits").read_text()
        assert re.search(rf"Max core file size +0 +{CORE_BYTES} ", limits), limits


# The control socket


def ask_as(user: int, control: Path, path: str = "/v1/status") -> subprocess.CompletedProcess[str]:
    """What a process of that user is told."""
    script = (
        "import http.client, socket, sys\n"
        "connection = http.client.HTTPConnection('localhost', timeout=10)\n"
        "connection.sock = socket.socket(socket.AF_UNIX)\n"
        "connection.sock.settimeout(10)\n"
        "connection.sock.connect(sys.argv[1])\n"
        "connection.request('GET', sys.argv[2])\n"
        "print(connection.getresponse().read().decode())\n"
    )
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return run([*become, "/usr/bin/python3", "-c", script, control, path], expect=None)


@pytest.mark.root
def test_the_control_socket_hears_its_user_and_root_and_nobody_else(shared: Pair) -> None:
    control = shared.primary.control
    assert control.stat().st_mode & 0o777 == 0o600
    assert ask_as(0, control).returncode == 0
    # Neither by its mode, nor when somebody has opened it to all.
    shared.directory.chmod(0o755)
    assert "PermissionError" in ask_as(NOBODY, control).stderr
    control.chmod(0o666)
    turned_away = ask_as(NOBODY, control)
    assert turned_away.returncode != 0
    assert turned_away.stdout == ""
    assert f"of user {NOBODY} was turned away" in shared.primary.words()
    assert ask_as(0, control).returncode == 0


def test_names_on_the_status_page_are_text(shared: Pair) -> None:
    label = "<script>alert(1)</script>\"'&"
    shared.primary.verb("snapshot", "v", "--label", label)
    status = json.dumps(shared.backup.status())
    assert json.dumps(label)[1:-1] in status
    for path in ("/", "/page.js", "/page.css"):
        text = raw(shared.backup, "GET", path)[1]
        assert "alert(1)" not in text, path
        for runs in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert runs not in text, f"{path} runs text: {runs}"


READ_ONLY = ("/", "/page.js", "/page.css", "/metrics", "/events", "/v1/status")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"])
def test_the_status_page_takes_no_orders(shared: Pair, method: str) -> None:
    for path in READ_ONLY:
        status, _ = raw(shared.primary, method, path)
        assert status in {400, 404, 405}, path


@pytest.mark.parametrize(
    "name",
    [
        "..%2fv",
        "%2e%2e/%2e%2e/etc/passwd",
        "%00",
        "v%00",
        "%ff%fe",
        "a" * 4096,
        "v@../x",
        "..",
        ".",
    ],
)
def test_a_volume_is_asked_for_by_name_and_a_path_leads_nowhere(shared: Pair, name: str) -> None:
    for path in (f"/v1/volumes/{name}", f"/v1/volumes/{name}/picture", f"/{name}"):
        status, said = raw(shared.primary, "GET", path)
        assert status in {400, 404, 405}, said
        assert "root:" not in said
    assert shared.primary.alive


def raw(daemon: Daemon, method: str, path: str) -> tuple[int, str]:
    """Status and text of an answer."""
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(connection):
        connection.sock.settimeout(20)
        connection.sock.connect(str(daemon.control))
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


# Secrets

SEEN = ("environ", "cmdline", "stat", "status")
PASSPHRASE = "correct-horse-battery-staple"


def test_no_secret_is_seen_in_arguments_environment_logs_reports_or_on_the_medium(
    closed: Pair,
) -> None:
    secret = closed.directory / "passphrase"
    secret.touch(mode=0o600)
    secret.write_text(PASSPHRASE + "\n")
    key = closed.directory / "identity"
    made = run(["age-keygen"])
    identity = next(line for line in made.stdout.splitlines() if line.startswith("AGE-SECRET-"))
    key.touch(mode=0o600)
    key.write_text(identity + "\n")
    recipient = re.findall(r"age1[0-9a-z]+", made.stdout + made.stderr)[0]
    run(["qemu-io", "-f", "raw", "-c", "write -P 5 0 1M", "-c", "flush", closed.uri])
    cut = closed.snapshot()
    words = ("bundle", "create", f"v@{cut}", "--json")
    media = [closed.directory / "one", closed.directory / "two"]
    said = closed.backup.verb(*words, "--to", media[0], "--passphrase-file", secret).stdout
    said += closed.backup.verb(*words, "--to", media[1], "--recipient", recipient).stdout
    said += closed.primary.verb("merge", media[0], "v", "--passphrase-file", secret).stdout
    said += closed.primary.verb("merge", media[1], "v", "--identity", key, "--json").stdout
    said += closed.primary.verb("attach", media[1], "v", "--identity", key, expect=None).stderr
    pem = (closed.directory / "pki" / "server-key.pem").read_text().splitlines()[1]
    secrets = [PASSPHRASE.encode(), identity.encode(), pem.encode()]
    # The key of a bundle, as it goes over the control socket.
    secrets += [found for medium in media for found in unwrapped(medium, secret, key)]
    assert len(secrets) == 3 + 2
    for secret_text in secrets:
        for place, text in places(closed, said):
            assert secret_text not in text, place


def unwrapped(medium: Path, passphrase: Path, identity: Path) -> list[bytes]:
    """The digits of the bundle's key, told by the library."""
    script = (
        "import sys, dualrestore as dr\n"
        "words = dict(identity=sys.argv[3]) if sys.argv[2] == '-' else "
        "dict(passphrase=open(sys.argv[2]).read().strip())\n"
        "print(dr.Bundle.open(sys.argv[1], **words).trust.key.text().decode().split()[2])\n"
    )
    word = passphrase if b"scrypt" in (medium / "key.age").read_bytes() else "-"
    told = run([sys.executable, "-c", script, medium, word, identity]).stdout.strip()
    assert len(told) >= 32
    return [told.encode()]


def places(pair: Pair, said: str) -> list[tuple[str, bytes]]:
    """Where a secret must not be."""
    found = [("what the verbs said", said.encode())]
    for daemon in (pair.primary, pair.backup):
        name, process = daemon.log.stem, process_of(daemon)
        found += [(f"{part} of {name}", (process / part).read_bytes()) for part in SEEN]
        found.append((f"status of {name}", json.dumps(daemon.ask("/v1/status")).encode()))
        found.append((f"metrics of {name}", raw(daemon, "GET", "/metrics")[1].encode()))
    own = {pair.directory / name for name in ("passphrase", "identity", "pki")}
    files = [path for path in pair.directory.rglob("*") if path.is_file()]
    return found + [
        (str(path), path.read_bytes()) for path in files if not own & {path, *path.parents}
    ]
