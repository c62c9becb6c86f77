"""NBD front doors: what reaches the core, and TLS as the core speaks it."""

import datetime
import hashlib
import os
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trustme

from dualrestore.config import Address, TcpExport, UnixExport
from dualrestore.core import NbdServer, PrimaryVolume
from dualrestore.errors import BusyError, UsageError
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_door import NbdDoor
from dualrestore.transport.tls import tls_context, tls_parts

GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 3)
FLAGS = struct.pack(">I", 3)
LIST, STARTTLS, INFO = 3, 5, 6
ACK, SERVER, UNKNOWN, TLS_REQUIRED = 1, 2, 2**31 + 6, 2**31 + 5


def option(number: int, payload: bytes = b"") -> bytes:
    """One option of a client."""
    return struct.pack(">QII", 0x49484156454F5054, number, len(payload)) + payload


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


def free_address(host: str) -> Address:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as probe:
        return Address(host, probe.getsockname()[1])


@pytest.fixture
def tls_server(pki: Path) -> Iterator[NbdServer]:
    """A server that speaks TLS and has no exports yet."""
    server = NbdServer(tls_parts(pki))
    yield server
    assert server.shutdown(10_000)


@pytest.fixture
def tls_door(thread: LoopThread, tls_server: NbdServer) -> Iterator[Address]:
    address = free_address("127.0.0.1")
    door = NbdDoor(thread, tls_server, TcpExport(address))
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
    door = NbdDoor(thread, cast("Any", sessions), export)
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
    door = NbdDoor(thread, cast("Any", sessions), export)
    door.open()
    for is_full, answer in ((True, b""), (False, GREETING)):
        sessions.is_full = is_full
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(export.path))
            assert exactly(client, 18) == answer
    door.close()


def test_a_name_is_listened_at_on_every_address_that_it_leads_to(
    thread: LoopThread, sessions: Sessions
) -> None:
    places = {place[0] for *_, place in socket.getaddrinfo("localhost", 1)}
    address = Address("localhost", free_address("127.0.0.1").port)
    door = NbdDoor(thread, cast("Any", sessions), TcpExport(address))
    door.open()
    for place in places:
        with socket.create_connection((str(place), address.port), 20) as client:
            assert exactly(client, 18) == GREETING, place
    door.close()


def test_an_ipv6_address_is_listened_at(thread: LoopThread, sessions: Sessions) -> None:
    address = free_address("::1")
    door = NbdDoor(thread, cast("Any", sessions), TcpExport(address))
    door.open()
    with connect(address):
        pass
    with pytest.raises(BusyError, match=r"\[::1\]"):
        NbdDoor(thread, cast("Any", sessions), TcpExport(address)).open()
    door.close()


def start_tls(address: Address, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A client inside TLS."""
    client = connect(address)
    client.sendall(FLAGS + option(STARTTLS))
    assert struct.unpack(">QIII", exactly(client, 20))[2] == ACK
    return context.wrap_socket(client, server_hostname="localhost")


def replies(client: socket.socket, said: bytes) -> list[tuple[int, bytes]]:
    """Kinds and bodies of the replies to one option, up to the last."""
    client.sendall(said)
    found: list[tuple[int, bytes]] = []
    while not found or found[-1][0] in {SERVER, 3}:
        _, _, kind, length = struct.unpack(">QIII", exactly(client, 20))
        found.append((kind, exactly(client, length)))
    return found


def test_inside_tls_the_handshake_goes_on_with_nothing_agreed_on(
    tls_door: Address, pki: Path
) -> None:
    with start_tls(tls_door, tls_context(pki, "client")) as inside:
        assert inside.version() == "TLSv1.3"
        # Neither greeting nor flags again; a meta context without structured replies is invalid.
        assert replies(inside, option(LIST)) == [(ACK, b"")]
        query = struct.pack(">II", 0, 0)
        assert replies(inside, option(9, query))[0][0] == 2**31 + 3
        assert replies(inside, option(STARTTLS))[0][0] == 2**31 + 3


def test_nothing_is_served_without_tls(tls_door: Address) -> None:
    with connect(tls_door) as client:
        client.sendall(FLAGS)
        assert replies(client, option(LIST))[0][0] == TLS_REQUIRED


def test_plain_bytes_behind_starttls_end_the_connection(tls_door: Address) -> None:
    with connect(tls_door) as client:
        client.sendall(FLAGS + option(STARTTLS) + b"injected")
        assert len(exactly(client, 20)) <= 20
        assert has_ended(client)


def test_plain_bytes_instead_of_tls_end_the_connection(tls_door: Address) -> None:
    with connect(tls_door) as client:
        client.sendall(FLAGS + option(STARTTLS))
        exactly(client, 20)
        client.sendall(option(LIST) * 20)
        received = b""
        while piece := client.recv(100):
            received += piece
        assert not received or received[0] == 21, "nothing but an alert of TLS"


def refused(address: Address, context: ssl.SSLContext) -> None:
    """The handshake fails, or the first bytes after it: in TLS 1.3 a client learns late."""
    try:
        with start_tls(address, context) as inside:
            inside.sendall(option(LIST))
            assert has_ended(inside)
    except (ssl.SSLError, ConnectionError):
        pass


def test_a_client_without_a_good_certificate_is_not_served(
    tls_door: Address, pki: Path, other_pki: Path, tmp_path: Path
) -> None:
    bare = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    refused(tls_door, bare)
    stranger = tls_context(other_pki, "client")
    stranger.load_verify_locations(cafile=str(pki / "ca-cert.pem"))
    refused(tls_door, stranger)
    self_signed = ssl.create_default_context(cafile=str(pki / "ca-cert.pem"))
    trustme.CA().issue_cert("localhost").configure_cert(self_signed)
    refused(tls_door, self_signed)
    old = tls_context(pki, "client")
    old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
    refused(tls_door, old)


def test_an_expired_certificate_is_refused(thread: LoopThread, tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    expired = authority.issue_cert("localhost", not_after=yesterday)
    server = NbdServer(
        (
            authority.cert_pem.bytes(),
            issued.cert_chain_pems[0].bytes(),
            issued.private_key_pem.bytes(),
        )
    )
    address = free_address("127.0.0.1")
    door = NbdDoor(thread, server, TcpExport(address))
    door.open()
    for certificate, is_good in ((issued, True), (expired, False)):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        certificate.configure_cert(context)
        if is_good:
            with start_tls(address, context) as inside:
                assert replies(inside, option(LIST)) == [(ACK, b"")]
        else:
            refused(address, context)
    door.close()
    assert server.shutdown(10_000)


def test_what_is_no_certificate_is_refused_with_words(pki: Path) -> None:
    authority, certificate, key = tls_parts(pki)
    _, _, other_key = (*tls_parts(pki)[:2], trustme.CA().issue_cert("x").private_key_pem.bytes())
    for parts, words in (
        ((b"", certificate, key), "authority"),
        ((authority, b"nonsense", key), "certificate"),
        ((authority, certificate, b"nonsense"), "key"),
        ((authority, certificate, other_key), "certificate and its key"),
    ):
        with pytest.raises(UsageError, match=words):
            NbdServer(parts)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[PrimaryVolume]:
    opened = PrimaryVolume.open(
        str(tmp_path / "state"),
        "v",
        str(tmp_path / "disk"),
        size=1 << 20,
        block_size=4096,
        mirror="flush",
        backups=1,
        missing_deadline_ms=100,
    )
    yield opened
    opened.close()


def test_an_export_exists_only_for_the_clients_that_it_is_for(
    tls_door: Address, tls_server: NbdServer, pki: Path, volume: PrimaryVolume
) -> None:
    certificate = (pki / "client-cert.pem").read_text()
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest()
    colons = ":".join(digest[at : at + 2].upper() for at in range(0, 64, 2))
    for name, allowed in (
        ("everybody", None),
        ("by-host", ["other", "LOCALHOST"]),
        ("by-address", ["127.0.0.1"]),
        ("by-fingerprint", [f"sha256:{colons}"]),
        ("nobody", []),
        ("others", ["localhost.example", f"sha256:{'0' * 64}", "local"]),
        ("fingerprint-as-name", [digest]),
    ):
        tls_server.add_volume(name, volume, allowed)
    mine = ["by-address", "by-fingerprint", "by-host", "everybody"]
    with start_tls(tls_door, tls_context(pki, "client")) as inside:
        listed = [body[4:].decode() for kind, body in replies(inside, option(LIST)) if body]
        assert listed == mine
        for name in (*mine, "nobody", "others", "fingerprint-as-name", ""):
            query = struct.pack(">I", len(name)) + name.encode() + bytes(2)
            last = replies(inside, option(INFO, query))[-1][0]
            assert (last == ACK) == (name in mine), name
            assert last in {ACK, UNKNOWN}


def test_an_export_is_for_a_common_name_and_for_other_names_of_a_certificate(
    thread: LoopThread, volume: PrimaryVolume
) -> None:
    authority = trustme.CA()
    own = authority.issue_cert("localhost")
    parts = own.cert_chain_pems[0].bytes(), own.private_key_pem.bytes()
    server = NbdServer((authority.cert_pem.bytes(), *parts))
    for name in ("Operator", "ops@example.org", "2001:db8:0::1"):
        server.add_volume(name, volume, [name])
    address = free_address("127.0.0.1")
    door = NbdDoor(thread, server, TcpExport(address))
    door.open()
    for identities, common_name, expected in (
        (["some.host"], "operator", ["Operator"]),
        (["ops@example.org"], None, ["ops@example.org"]),
        (["2001:db8::1", "h"], "x", ["2001:db8:0::1"]),
    ):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        authority.issue_cert(*identities, common_name=common_name).configure_cert(context)
        with start_tls(address, context) as inside:
            listed = [body[4:].decode() for _, body in replies(inside, option(LIST)) if body]
            assert listed == expected
    door.close()
    assert server.shutdown(10_000)


def test_without_tls_an_export_that_is_for_some_is_for_nobody(volume: PrimaryVolume) -> None:
    server = NbdServer()
    server.add_volume("some", volume, ["localhost"])
    server.add_volume("all", volume)
    ours, theirs = socket.socketpair()
    server.serve(theirs.detach(), "test")
    with ours:
        assert exactly(ours, 18) == GREETING
        ours.sendall(FLAGS)
        assert [body[4:] for _, body in replies(ours, option(LIST)) if body] == [b"all"]
    assert server.shutdown(10_000)


def test_a_megabyte_crosses_tls_both_ways_and_is_the_same(
    tls_door: Address, tls_server: NbdServer, pki: Path, volume: PrimaryVolume
) -> None:
    tls_server.add_volume("v", volume)
    content = os.urandom(1 << 20)
    with start_tls(tls_door, tls_context(pki, "client")) as inside:
        replies(inside, option(7, struct.pack(">I", 1) + b"v" + bytes(2)))
        write = struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, 0, len(content)) + content
        read = struct.pack(">IHHQQI", 0x25609513, 0, 0, 8, 0, len(content))
        sender = threading.Thread(target=inside.sendall, args=(write,))
        sender.start()
        assert exactly(inside, 16) == struct.pack(">IIQ", 0x67446698, 0, 7)
        sender.join()
        inside.sendall(read)
        assert exactly(inside, 16) == struct.pack(">IIQ", 0x67446698, 0, 8)
        assert exactly(inside, len(content)) == content
