"""NBD front doors, with a session that sends everything back."""

import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dualrestore.config import Address, TcpExport, UnixExport
from dualrestore.errors import BusyError
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_door import NbdDoor
from dualrestore.transport.nbd_plain import GREETING
from dualrestore.transport.tls import tls_context

FLAGS = struct.pack(">I", 3)
STARTTLS = struct.pack(">QII", 0x49484156454F5054, 5, 0)


class Sessions:
    """Takes descriptors, as the core does; greets, then sends back what comes."""

    def __init__(self) -> None:
        self.peers: list[str] = []
        self.is_full = False

    def serve(self, descriptor: int, peer: str) -> None:
        if self.is_full:
            os.close(descriptor)
            raise BusyError("too many")
        self.peers.append(peer)
        threading.Thread(target=self._session, args=(descriptor,), daemon=True).start()

    def _session(self, descriptor: int) -> None:
        with socket.socket(fileno=descriptor) as client:
            assert client.gettimeout() is None
            client.sendall(GREETING)
            while data := client.recv(65536):
                client.sendall(data)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def tls_door(thread: LoopThread, sessions: Sessions, pki: Path) -> Iterator[Address]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = Address("127.0.0.1", probe.getsockname()[1])
    context = tls_context(pki, "server")
    door = NbdDoor(thread, cast("Any", sessions), TcpExport(address), context)
    door.open()
    yield address
    door.close()


def exactly(client: socket.socket, count: int) -> bytes:
    """That many bytes, or what came before the end."""
    received = b""
    while len(received) < count and (piece := client.recv(count - len(received))):
        received += piece
    return received


def connect(address: Address) -> socket.socket:
    client = socket.create_connection((address.host, address.port), 20)
    assert exactly(client, len(GREETING)) == GREETING
    return client


def has_ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def test_a_unix_connection_is_given_away_whole(
    thread: LoopThread, sessions: Sessions, tmp_path: Path
) -> None:
    export = UnixExport(tmp_path / "v.sock")
    door = NbdDoor(thread, cast("Any", sessions), export, None)
    door.open()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(export.path))
        client.sendall(b"x" * 1000)
        assert exactly(client, 18 + 1000) == GREETING + b"x" * 1000
    door.close()
    assert not export.path.exists()


def test_a_connection_too_many_is_closed_and_the_next_one_accepted(
    thread: LoopThread, sessions: Sessions, tmp_path: Path
) -> None:
    export = UnixExport(tmp_path / "v.sock")
    door = NbdDoor(thread, cast("Any", sessions), export, None)
    door.open()
    for is_full, answer in ((True, b""), (False, GREETING)):
        sessions.is_full = is_full
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(export.path))
            assert exactly(client, 18) == answer
    door.close()


def test_behind_tls_a_session_is_as_if_there_were_none(
    tls_door: Address, sessions: Sessions, pki: Path
) -> None:
    client = connect(tls_door)
    client.sendall(FLAGS + STARTTLS)
    assert struct.unpack(">QIII", exactly(client, 20))[2] == 1
    data = os.urandom(3 << 20)
    with tls_context(pki, "client").wrap_socket(client, server_hostname="localhost") as inside:
        assert inside.version() == "TLSv1.3"
        sender = threading.Thread(target=inside.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(FLAGS) + len(data):
            received += inside.recv(65536)
        sender.join()
    assert bytes(received) == FLAGS + data
    assert [peer.endswith("over TLS") for peer in sessions.peers] == [True]


def test_nothing_is_served_without_tls(tls_door: Address, sessions: Sessions) -> None:
    with connect(tls_door) as client:
        option = struct.pack(">QII", 0x49484156454F5054, 3, 0)
        client.sendall(FLAGS + option)
        assert struct.unpack(">QIII", exactly(client, 20))[2] == 2**31 + 5
    assert sessions.peers == []


def test_plain_bytes_behind_starttls_end_the_connection(
    tls_door: Address, sessions: Sessions
) -> None:
    with connect(tls_door) as client:
        client.sendall(FLAGS + STARTTLS + b"injected")
        assert client.recv(100) == b""
    assert sessions.peers == []


def test_a_client_without_a_certificate_is_not_served(
    tls_door: Address, sessions: Sessions, pki: Path
) -> None:
    context = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    client = connect(tls_door)
    client.sendall(FLAGS + STARTTLS)
    exactly(client, 20)
    with context.wrap_socket(client, server_hostname="localhost") as inside:
        # In TLS 1.3 the client learns of it with the first bytes that it reads.
        assert has_ended(inside)
    assert sessions.peers == []
