"""Names of exports, and ways to them that are refused before anything is connected to."""

import contextlib
import socket
import ssl
import threading
from pathlib import Path

import pytest

from dualrestore.config import Address
from dualrestore.errors import DualRestoreError, FormatError, LinkError, UsageError
from dualrestore.transport.nbd_source import open_export
from dualrestore.transport.nbd_uri import NbdUri, is_nbd_uri, parse_nbd_uri

BACKUP = Address("backup.example", 10809)


@pytest.mark.parametrize(
    ("text", "place", "export", "encrypted"),
    [
        ("nbd://backup.example/db@7f3a", BACKUP, "db@7f3a", False),
        ("nbds://backup.example:1/", Address("backup.example", 1), "", True),
        ("nbds://backup.example", BACKUP, "", True),
        ("nbd://[::1]:10810//disk", Address("::1", 10810), "/disk", False),
        ("nbd://backup.example/hello%20w%C3%B6rld", BACKUP, "hello wörld", False),
        ("nbd+unix:///db@7f3a?socket=/run/x.sock", Path("/run/x.sock"), "db@7f3a", False),
        ("nbds+unix:///?socket=/run/a%20b", Path("/run/a b"), "", True),
    ],
)
def test_an_export_and_the_way_to_it_are_read(
    text: str, place: Address | Path, export: str, encrypted: bool
) -> None:
    uri = parse_nbd_uri(text)
    assert (uri.place, uri.export, uri.encrypted) == (place, export, encrypted)
    assert (uri.certificates, str(uri)) == (None, text)
    assert is_nbd_uri(text)


def test_certificates_and_the_name_in_them_are_parameters() -> None:
    text = "nbds+unix:///db?socket=/s&tls-certificates=/etc/pki&tls-hostname=backup.example"
    uri = parse_nbd_uri(text)
    assert (uri.certificates, uri.hostname) == (Path("/etc/pki"), "backup.example")
    assert parse_nbd_uri("nbds://backup.example/db").hostname == "backup.example"
    assert parse_nbd_uri("nbds+unix:///db?socket=/s").hostname == "localhost"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nbd+vsock://2/db", "expected nbd, nbds"),
        ("nbd://", "no host"),
        ("nbd:///db", "no host"),
        ("nbd://host:0x/db", "NBD URI"),
        ("nbd://host:99999/db", "NBD URI"),
        ("nbd://user@host/db", "without user"),
        ("nbd://host/db#part", "without user and fragment"),
        ("nbd://host/%ff", "NBD URI"),
        ("nbd://host/db?socket=/s", "found socket"),
        ("nbd://host/db?tls-verify-peer=0", "found tls-verify-peer"),
        ("nbd+unix:///db", "socket=PATH"),
        ("nbd+unix:///db?socket=s", "absolute path"),
        ("nbd+unix://host/db?socket=/s", "socket=PATH"),
        ("nbd+unix:///db?socket=/s&socket=/t", "twice"),
        ("nbd+unix:///db?socket", "NBD URI"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str) -> None:
    assert is_nbd_uri(text)
    with pytest.raises(UsageError, match=words):
        parse_nbd_uri(text)


@pytest.mark.parametrize("word", ["db", "./nbd:x", "/media/nbd", "-", "nbdx://h/e", "nbd", ""])
def test_a_file_is_no_export(word: str) -> None:
    assert not is_nbd_uri(word)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nbd://192.0.2.1/db", "to another machine"),
        ("nbds://127.0.0.1/db", "for this scheme"),
        ("nbds+unix:///db?socket=/s", "for this scheme"),
    ],
)
def test_without_certificates_there_is_no_way_to_another_machine(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words), open_export(parse_nbd_uri(text)):
        pass


class Server(threading.Thread):
    """Says these bytes to whoever comes, and goes."""

    def __init__(self, place: Path, said: bytes) -> None:
        super().__init__(daemon=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen()
        self._said = said
        self.heard = b""
        self.start()

    def run(self) -> None:
        """One client, who may leave at any moment."""
        with (
            contextlib.suppress(OSError),
            self._listener,
            self._listener.accept()[0] as client,
        ):
            client.sendall(self._said)
            client.shutdown(socket.SHUT_WR)
            while piece := client.recv(4096):
                self.heard += piece


GREETING = b"NBDMAGICIHAVEOPT\0\3"
REPLY = bytes.fromhex("0003e889045565a9") + bytes([0, 0, 0, 5])
ACKNOWLEDGED = REPLY + bytes([0, 0, 0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"", LinkError),
        (GREETING[:-1], LinkError),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian", FormatError),
        (GREETING[:-1] + b"\0", FormatError),
        (GREETING + REPLY + b"\x80\0\0\1" + b"\0\0\0\2no", UsageError),
        (GREETING + REPLY + b"\x80\0\0\1" + b"\xff\xff\xff\xff", FormatError),
        (GREETING + REPLY + b"\0\0\0\1" + b"\0\0\0\1x", UsageError),
        (GREETING + ACKNOWLEDGED, LinkError),
        (GREETING + ACKNOWLEDGED + b"no tls, but an answer in the clear", LinkError),
    ],
)
def test_nothing_of_the_export_is_said_to_a_server_that_does_not_begin_tls(
    tmp_path: Path, pki: Path, said: bytes, kind: type[DualRestoreError]
) -> None:
    place = tmp_path / "socket"
    server = Server(place, said)
    uri = NbdUri("uri", place, "secret-name", True, pki, "localhost")
    with pytest.raises(kind), open_export(uri):
        pass
    server.join(30)
    assert b"secret-name" not in server.heard


def test_a_certificate_for_another_name_is_no_tls(tmp_path: Path, pki: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "server-cert.pem", pki / "server-key.pem")
    place = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as client:
            client.sendall(GREETING + ACKNOWLEDGED)
            client.recv(20, socket.MSG_WAITALL)
            with contextlib.suppress(OSError):
                context.wrap_socket(client, server_side=True)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    uri = NbdUri("uri", place, "db", True, pki, "elsewhere.example")
    with pytest.raises(LinkError, match="no TLS"), open_export(uri):
        pass
    thread.join(30)
