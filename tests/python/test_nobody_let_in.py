"""Who may come in, and what whoever may not gets: as tables, against real servers on sockets.

| door | asked by |
|---|---|
| NBD behind TLS, NBD on a Unix socket | clients that speak wrongly, too early, too much |
| link behind TLS | peers with wrong certificates, wrong bytes, wrong lives of the volume |

Elsewhere: media that were damaged, swapped, forged (`tests/hostile`), every option of a session
without sockets (`tests/nbd`), fencing row by row (`src/link/fence.rs`), crowds, secrets and the
control socket of a whole daemon (`tests/e2e/test_daemon_is_closed.py`).
"""

import datetime
import shutil
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import pytest
import trustme

from dualrestore.config import Address, BackupAddress, TcpExport, UnixExport, check_name
from dualrestore.core import LinkHub, NbdServer, PrimaryVolume
from dualrestore.errors import ConfigurationError, FormatError
from dualrestore.transport.link import LinkTransport
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_door import NbdDoor
from dualrestore.transport.tls import tls_context, tls_parts
from tests.python.live_pair import NAME, LivePair, carry, once_unlocked, wait_until

SIZE = 4 << 20
GREETING = struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, 0b11)
"""NBDMAGIC, IHAVEOPT, FIXED_NEWSTYLE and NO_ZEROES."""
SECONDS = 20.0
OPTION_MAGIC, REPLY_MAGIC = 0x49484156454F5054, 0x3E889045565A9
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
OPTIONS = {
    "abort": ABORT, "list": LIST, "peek": 4, "info": INFO, "go": GO, "structured reply": 8,
    "list meta context": 9, "set meta context": 10, "extended headers": 11, "unknown": 77,
}  # fmt: skip
ACK, ERROR = 1, 2**31
TLS_REQUIRED = ERROR + 5
PAYLOADS = {"empty": b"", "with a payload": b"\xff" * 100}


def has_ended(client: socket.socket) -> bool:
    """Whether the other side ends it, having said nothing more."""
    try:
        return client.recv(1) == b""
    except (ssl.SSLError, ConnectionError):
        return True


class Nbd:
    """A client that says what it is told to."""

    def __init__(self, where: Address | Path) -> None:
        if isinstance(where, Path):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(SECONDS)
            self.socket.connect(str(where))
        else:
            self.socket = socket.create_connection(where, SECONDS)
        assert self.exactly(len(GREETING)) == GREETING
        self.send(struct.pack(">I", 3))

    def __enter__(self) -> "Nbd":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def exactly(self, count: int) -> bytes:
        """That many bytes, or what came before the end."""
        received = b""
        while len(received) < count and (piece := self.socket.recv(count - len(received))):
            received += piece
        return received

    def option(self, number: int, payload: bytes = b"", length: int | None = None) -> None:
        size = len(payload) if length is None else length
        self.send(struct.pack(">QII", OPTION_MAGIC, number, size) + payload)

    def reply(self) -> int | None:
        """The kind of the next reply to an option; None at the end."""
        head = self.exactly(20)
        if not head:
            return None
        magic, _, kind, length = struct.unpack(">QIII", head)
        assert magic == REPLY_MAGIC
        self.exactly(length)
        return cast("int", kind)

    def answer(self) -> int | None:
        """The last reply to an option: acknowledgement, error, or None at the end."""
        while (kind := self.reply()) is not None:
            if kind == ACK or kind >= ERROR:
                break
        return kind

    def start_tls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        self.option(STARTTLS)
        assert self.reply() == ACK
        self.socket = context.wrap_socket(self.socket, server_hostname=name)

    @property
    def is_over(self) -> bool:
        """Whether the server ended the connection, having said nothing more."""
        return has_ended(self.socket)


class Stage(NamedTuple):
    """A mirrored volume behind doors of each kind."""

    pair: LivePair
    behind_tls: NbdServer
    thread: LoopThread
    pki: "Pki"
    plain: Path
    tls: Address
    link: Address

    @property
    def sessions(self) -> int:
        """NBD connections, but for the pair's own client."""
        return len(self.pair.server.connections()) + len(self.behind_tls.connections()) - 1


class Pki:
    """Certificates, good and bad, each as a directory of the configuration."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.authority = trustme.CA()
        self.stranger = trustme.CA()

    def directory(
        self,
        name: str,
        issued: trustme.LeafCert | None,
        trusted: trustme.CA | None = None,
    ) -> Path:
        """Written once; the certificate stands for both sides."""
        place = self.place / name
        if place.exists():
            return place
        place.mkdir()
        (trusted or self.authority).cert_pem.write_to_path(place / "ca-cert.pem")
        for side in ("server", "client"):
            key = place / f"{side}-key.pem"
            key.touch(mode=0o600)
            if issued is None:
                # Signed by itself: the certificate of an authority of its own.
                own = trustme.CA()
                own.private_key_pem.write_to_path(key)
                own.cert_pem.write_to_path(place / f"{side}-cert.pem")
            else:
                issued.private_key_pem.write_to_path(key)
                issued.cert_chain_pems[0].write_to_path(place / f"{side}-cert.pem")
        return place

    def named(self, name: str) -> Path:
        """A directory by what is wrong with it; `good` is not."""
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        names = ("localhost", "127.0.0.1")
        match name:
            case "good":
                issued = self.authority.issue_cert(*names)
            case "wrong authority":
                issued = self.stranger.issue_cert(*names)
            case "expired":
                begun = past - datetime.timedelta(days=1)
                issued = self.authority.issue_cert(*names, not_before=begun, not_after=past)
            case "wrong name":
                issued = self.authority.issue_cert("elsewhere.example", "127.0.0.2")
            case _:
                return self.directory(name, None)
        return self.directory(name, issued)

    def context(self, name: str) -> ssl.SSLContext:
        """What a client shows; it takes any server, for the server is asked here."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if name == "tls 1.2":
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            name = "good"
        if name != "no certificate":
            place = self.named(name)
            context.load_cert_chain(place / "client-cert.pem", place / "client-key.pem")
        return context


def free_address() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return Address("127.0.0.1", probe.getsockname()[1])


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Made once: nobody who is not let in changes it, which is what is tested."""
    place = tmp_path_factory.mktemp("stage")
    pki = Pki(place)
    pair = LivePair(place, SIZE)
    pair.wait_mirrored()
    thread = LoopThread("doors")
    tls = tls_context(pki.named("good"), "server")
    server = NbdServer(tls_parts(pki.named("good")))
    server.add_volume(NAME, pair.primary)
    plain, behind_tls, link = place / "v.sock", free_address(), free_address()
    doors = [
        NbdDoor(thread, pair.server, UnixExport(plain)),
        NbdDoor(thread, server, TcpExport(behind_tls)),
    ]
    transport = LinkTransport(pair.theirs, thread, server_tls=tls)
    try:
        for door in doors:
            door.open()
        transport.listen(link)
        yield Stage(pair, server, thread, pki, plain, behind_tls, link)
    finally:
        for door in doors:
            door.close()
        transport.stop()
        thread.stop()
        assert server.shutdown(10_000)
        pair.close()


@pytest.fixture(autouse=True)
def nothing_happened(stage: Stage) -> Iterator[None]:
    """Whatever was tried, the volume is as it was, and whoever may come in is served."""
    before = {key: stage.pair.status()[key] for key in ("generation", "current_bytes", "volume")}
    yield
    after = {key: stage.pair.status()[key] for key in before}
    assert after == before
    assert stage.pair.client.read(0, 4096) == bytes(4096)
    wait_until("no session is left", lambda: stage.sessions == 0)


# NBD, before TLS


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "abort"])
def test_before_tls_an_option_is_told_that_tls_comes_first(
    stage: Stage, option: str, payload: str
) -> None:
    with Nbd(stage.tls) as client:
        client.option(OPTIONS[option], PAYLOADS[payload])
        assert client.reply() == TLS_REQUIRED
        # In step, and still outside.
        client.option(LIST)
        assert client.reply() == TLS_REQUIRED


@pytest.mark.parametrize("payload", [b"", b"v", b"../v", b"a" * 4096])
def test_before_tls_naming_an_export_ends_the_connection(stage: Stage, payload: bytes) -> None:
    with Nbd(stage.tls) as client:
        client.option(EXPORT_NAME, payload)
        assert client.is_over


@pytest.mark.parametrize("more", [b"\0", struct.pack(">QII", OPTION_MAGIC, LIST, 0)])
def test_what_stands_behind_starttls_in_the_clear_ends_the_connection(
    stage: Stage, more: bytes
) -> None:
    with Nbd(stage.tls) as client:
        client.send(struct.pack(">QII", OPTION_MAGIC, STARTTLS, 0) + more)
        # What came first may be answered; nothing is that came behind it, and no TLS begins.
        assert client.reply() in {ACK, None}
        assert client.is_over


def test_starttls_with_a_payload_is_invalid(stage: Stage) -> None:
    with Nbd(stage.tls) as client:
        client.option(STARTTLS, b"x")
        assert client.reply() == ERROR + 3


@pytest.mark.parametrize(
    ("what", "length"),
    [("65 KiB", 65537), ("2 GiB", 2**31 - 1), ("-2 GiB", 2**31), ("-1", 2**32 - 1)],
)
@pytest.mark.parametrize("door", ["plain", "tls"])
def test_a_length_that_no_option_has_ends_the_connection(
    stage: Stage, door: str, what: str, length: int
) -> None:
    where = stage.plain if door == "plain" else stage.tls
    with Nbd(where) as client:
        client.option(GO, b"x" * 64, length)
        assert client.is_over, what


# TLS


@pytest.mark.parametrize(
    "shown", ["no certificate", "wrong authority", "expired", "signed by itself", "tls 1.2"]
)
@pytest.mark.parametrize("door", ["nbd", "link"])
def test_a_client_with_a_bad_certificate_is_served_nothing(
    stage: Stage, door: str, shown: str
) -> None:
    context = stage.pki.context(shown)
    try:
        if door == "nbd":
            client = Nbd(stage.tls)
            client.start_tls(context)
            outside: socket.socket = client.socket
        else:
            outside = context.wrap_socket(socket.create_connection(stage.link, SECONDS))
    except (ssl.SSLError, ConnectionError):
        return
    with outside:
        # In TLS 1.3 the client learns of it with the first bytes that it reads.
        assert has_ended(outside)


@pytest.mark.parametrize("shown", ["wrong authority", "expired", "signed by itself", "wrong name"])
def test_a_primary_believes_no_backup_with_a_bad_certificate(
    stage: Stage, tmp_path: Path, shown: str
) -> None:
    hub, address = LinkHub(), free_address()
    server = LinkTransport(
        hub, stage.thread, server_tls=tls_context(stage.pki.named(shown), "server")
    )
    client = LinkTransport(
        stage.pair.ours, stage.thread, client_tls=tls_context(stage.pki.named("good"), "client")
    )
    (tmp_path / "other").mkdir()
    volume = PrimaryVolume.open(
        str(tmp_path / "other"), NAME, str(tmp_path / "other.img"), size=SIZE, block_size=4096,
        mirror="flush", backups=1, missing_deadline_ms=100,
    )  # fmt: skip
    try:
        server.listen(address)
        client.connect(volume, 0, BackupAddress(address, NAME))
        wait_until("it is told", lambda: bool(client.line_errors(volume, 0)))
        assert "certificate was not accepted" in client.line_errors(volume, 0)[0]
    finally:
        client.stop()
        server.stop()
        volume.close()
        hub.close()


def test_whoever_has_a_good_certificate_is_served(stage: Stage) -> None:
    with Nbd(stage.tls) as client:
        client.start_tls(stage.pki.context("good"))
        assert isinstance(client.socket, ssl.SSLSocket)
        assert client.socket.version() == "TLSv1.3"
        client.option(LIST)
        assert client.answer() == ACK


@pytest.mark.parametrize("option", ["starttls", *OPTIONS])
def test_inside_tls_an_option_with_nonsense_is_refused_and_the_stream_stays_in_step(
    stage: Stage, option: str
) -> None:
    with Nbd(stage.tls) as client:
        client.start_tls(stage.pki.context("good"))
        client.option({**OPTIONS, "starttls": STARTTLS}[option], b"\xff" * 100)
        answer = client.answer()
        if option == "abort":
            assert answer == ACK
            assert client.is_over
            return
        assert answer is not None
        assert answer > ERROR
        client.option(LIST)
        assert client.answer() == ACK


# Names

NAMES = {
    "of a parent": b"../v", "of a file": b"/etc/passwd", "with a directory": b"a/v",
    "of here": b"./v", "with a directory behind": b"v/", "in another case": b"V",
    "with a zero": b"v\0", "a zero": b"\0", "not UTF-8": b"\xff\xfe", "long": b"a" * 4096,
    "too long": b"a" * 4097, "of no snapshot": b"v@" + b"0" * 36, "of a path's snapshot": b"v@../v",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_export_that_is_not_there_is_not_found_whatever_it_is_called(
    stage: Stage, name: str
) -> None:
    encoded = struct.pack(">I", len(NAMES[name])) + NAMES[name] + b"\0\0"
    with Nbd(stage.plain) as client:
        for option in (INFO, GO):
            client.option(option, encoded)
            answer = client.answer()
            assert answer is not None
            assert answer > ERROR
        client.option(EXPORT_NAME, NAMES[name])
        assert client.is_over


@pytest.mark.parametrize("name", NAMES)
def test_a_volume_cannot_be_called_so(name: str) -> None:
    if name == "in another case":
        assert check_name("V") == "V"
        return
    with pytest.raises(ConfigurationError, match="volume name"):
        check_name(NAMES[name].decode(errors="surrogateescape"))


# Requests

READ, WRITE, TRIM, ZEROES, STATUS = 0, 1, 4, 6, 7
REQUESTS = {
    "read of 4 GiB": (0, READ, 0, 2**32 - 1),
    "read of -2 GiB": (0, READ, 0, 2**31),
    "read past the end": (0, READ, SIZE - 512, 1024),
    "read at a negative offset": (0, READ, 2**64 - 512, 512),
    "read whose end overflows": (0, READ, 2**64 - 512, 2**31),
    "read at the largest offset": (0, READ, 2**63, 512),
    "trim of everything and more": (0, TRIM, 0, 2**32 - 512),
    "zeroes past the end": (0, ZEROES, SIZE, 512),
    "unknown command": (0, 99, 0, 0),
    "unknown flag": (1 << 15, READ, 0, 512),
    "status of 4 GiB": (0, STATUS, 0, 2**32 - 1),
}


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_outside_its_bounds_is_an_error_and_the_stream_stays_in_step(
    stage: Stage, request_: str
) -> None:
    flags, command, offset, length = REQUESTS[request_]
    with Nbd(stage.plain) as client:
        client.option(GO, struct.pack(">I", 1) + b"v\0\0")
        assert client.answer() == ACK
        for asked in ((flags, command, 7, offset, length), (0, READ, 8, 0, 512)):
            client.send(struct.pack(">IHHQQI", 0x25609513, *asked))
        magic, error, cookie = struct.unpack(">IIQ", client.exactly(16))
        assert (magic, cookie) == (0x67446698, 7)
        assert error in {5, 22, 28, 75, 95}
        assert struct.unpack(">IIQ", client.exactly(16)) == (0x67446698, 0, 8)
        assert client.exactly(512) == bytes(512)


def test_a_write_of_more_than_anybody_may_send_ends_the_connection(stage: Stage) -> None:
    with Nbd(stage.plain) as client:
        client.option(GO, struct.pack(">I", 1) + b"v\0\0")
        assert client.answer() == ACK
        client.send(struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 7, 0, 2**32 - 1))
        error = client.exactly(16)
        assert error in {b"", struct.pack(">IIQ", 0x67446698, 22, 7)}
        assert client.is_over


# The link


@pytest.mark.parametrize(
    "said",
    [
        b"\0" * 4096, b"\xff" * 4096, b"GET / HTTP/1.1\r\nhost: ".ljust(4096, b"x"), GREETING * 100,
        *(struct.pack("<II", 0x4C5244, size) * 64 for size in (2**31, 2**31 + 1, 2**32 - 1)),
    ],
    ids=["zeros", "ones", "HTTP", "NBD", "-2 GiB", "-2 GiB + 1", "-1"],
)  # fmt: skip
def test_a_peer_that_does_not_speak_the_protocol_is_dropped(stage: Stage, said: bytes) -> None:
    peer = stage.pki.context("good").wrap_socket(socket.create_connection(stage.link, SECONDS))
    with peer:
        peer.sendall(said)
        try:
            while peer.recv(65536):
                pass
        except (ssl.SSLError, ConnectionError):
            pass
    assert stage.pair.is_connected


class Second:
    """A copy of the primary, as somebody makes who restores a machine from an image."""

    def __init__(self, stage: Stage, place: Path) -> None:
        place.mkdir()
        shutil.copytree(stage.pair.place / "primary", place / "state")
        shutil.copy(stage.pair.primary_device, place / "device")
        self.hub = LinkHub()
        self.volume = once_unlocked(
            lambda: PrimaryVolume.open(
                str(place / "state"), NAME, str(place / "device"), size=SIZE, block_size=4096,
                mirror="flush", backups=1, missing_deadline_ms=100,
            )
        )  # fmt: skip

    def refusal(self, theirs: LinkHub, name: str = NAME) -> str:
        """What a backup says to it."""
        ours = self.hub.connect(self.volume, 0, name, "mirror")
        their_end = theirs.accept()

        def is_over() -> bool:
            carry(ours, their_end)
            carry(their_end, ours)
            return not {"failed", "closed"}.isdisjoint({ours.state, their_end.state})

        wait_until("it is refused", is_over)
        carry(their_end, ours)
        said = f"{ours.error} {their_end.error}"
        for end in (ours, their_end):
            end.close()
        return said

    def close(self) -> None:
        self.volume.close()
        self.hub.close()


@pytest.fixture
def second(stage: Stage, tmp_path: Path) -> Iterator[Second]:
    """A second primary of the same volume."""
    made = Second(stage, tmp_path / "second")
    yield made
    made.close()


def test_a_second_primary_is_refused_while_the_first_is_there(stage: Stage, second: Second) -> None:
    assert "expected one primary, found a second" in second.refusal(stage.pair.theirs)
    assert stage.pair.is_connected


@pytest.mark.parametrize("name", ["../v", "/etc/passwd", "a/v", "V", "a" * 200, "\0", ""])
def test_a_backup_is_asked_for_its_volumes_by_name_and_for_nothing_else(
    stage: Stage, second: Second, name: str
) -> None:
    if name in {"\0", ""}:
        # It cannot even be said.
        with pytest.raises(FormatError, match="volume name"):
            second.refusal(stage.pair.theirs, name)
        return
    assert "found none: mend HOST:PORT/NAME" in second.refusal(stage.pair.theirs, name)
    assert stage.pair.is_connected


def test_a_primary_from_before_a_loss_is_refused_also_when_the_new_one_is_gone(
    tmp_path: Path, stage: Stage
) -> None:
    pair = LivePair(tmp_path, SIZE)
    pair.wait_mirrored()
    old = Second(stage._replace(pair=pair), tmp_path / "old")
    pair.restore("all")
    pair.cut()
    assert "generation" in old.refusal(pair.theirs)
    old.close()
    pair.close()


def test_a_primary_of_another_volume_is_refused(tmp_path: Path, stage: Stage) -> None:
    pair = LivePair(tmp_path, SIZE)
    pair.restore("none")
    pair.wait_mirrored()
    foreign = Second(stage._replace(pair=pair), tmp_path / "foreign")
    assert "another volume" in foreign.refusal(stage.pair.theirs)
    assert stage.pair.is_connected
    foreign.close()
    pair.close()
