"""Connects to exports of NBD servers, for the core to read from.

| place | without TLS |
|---|---|
| Unix socket, loopback | the core gets the socket itself |
| elsewhere | refused: the data has no checksums, so that the way must answer for it (law 9) |

With TLS the socket is ended here and relayed through a socket pair (`tls_relay`). Certificates are
those of the URI, or else the node's.

Guarantees: nothing of an export is said or read in the clear where TLS is wanted. Does not know:
what is read.
"""

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator
from pathlib import Path

from dualrestore.config import Address
from dualrestore.core import NbdSource
from dualrestore.errors import FormatError, LinkError, UsageError
from dualrestore.transport.nbd_uri import NbdUri, parse_nbd_uri
from dualrestore.transport.sockets import prepare_link_socket
from dualrestore.transport.tls import tls_context
from dualrestore.transport.tls_relay import TlsRelay

CONNECT_SECONDS = 10.0
TEXT_BYTES_MAX = 4096

_GREETING = struct.Struct(">QQH")
_MAGICS = (0x4E42444D41474943, 0x49484156454F5054)
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_REPLY_MAGIC = 0x3E889045565A9
_STARTTLS, _ACK = 5, 1
_FIXED_NEWSTYLE, _KNOWN_FLAGS = 1, 0b11


@contextlib.contextmanager
def open_export(uri: NbdUri | str, tls: ssl.SSLContext | Path | None = None) -> Iterator[NbdSource]:
    """The export of an NBD server, open for reading until it is left: something to `merge`.
    `tls`: the certificates, or their directory, where the URI names none.

    Raises `LinkError` if the server cannot be reached or goes away, `UsageError` if it has no such
    export or TLS is needed and nobody has named certificates.

    >>> with open_export("nbd+unix:///?socket=/no"):
    ...     pass
    Traceback (most recent call last):
    ...
    dualrestore.errors.LinkError: nbd+unix:///?socket=/no: cannot connect: No such file or directory
    """
    uri = parse_nbd_uri(uri) if isinstance(uri, str) else uri
    context = _context(uri, tls)
    with contextlib.ExitStack() as held:
        connection = held.enter_context(_connected(uri))
        if context is not None:
            _begin_tls(uri, connection)
            relay = TlsRelay(connection, context, uri.hostname)
            held.callback(relay.close)
            connection = relay.open(str(uri), CONNECT_SECONDS)
        descriptor = connection.detach()
        source = NbdSource(descriptor, uri.export, str(uri), greeted=context is not None)
        held.callback(source.close)
        yield source


def _context(uri: NbdUri, tls: ssl.SSLContext | Path | None) -> ssl.SSLContext | None:
    away = isinstance(uri.place, Address) and not uri.place.is_loopback
    if not (uri.encrypted or away):
        return None
    certificates = uri.certificates or tls
    if certificates is None:
        reason = "for this scheme" if uri.encrypted else "to another machine"
        raise UsageError(
            f"{uri}: expected TLS {reason}, found no certificates; add ?tls-certificates=DIR, or "
            "set tls in [node] of the configuration"
        )
    return tls_context(certificates, "client") if isinstance(certificates, Path) else certificates


def _connected(uri: NbdUri) -> socket.socket:
    connection: socket.socket | None = None
    try:
        if isinstance(uri.place, Address):
            connection = socket.create_connection(uri.place, CONNECT_SECONDS)
            prepare_link_socket(connection)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(str(uri.place))
    except OSError as problem:
        if connection is not None:
            connection.close()
        raise LinkError(f"{uri}: cannot connect: {problem.strerror or problem}") from problem
    return connection


def _exactly(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        piece = connection.recv(count - len(received))
        if not piece:
            raise ConnectionError("the server closed it")
        received += piece
    return bytes(received)


def _begin_tls(uri: NbdUri, connection: socket.socket) -> None:
    """Everything that is said in the clear: greeting, flags, STARTTLS."""
    try:
        *magics, flags = _GREETING.unpack(_exactly(connection, _GREETING.size))
        if tuple(magics) != _MAGICS or not flags & _FIXED_NEWSTYLE:
            raise FormatError(f"{uri}: expected an NBD server of fixed newstyle, found another")
        said = struct.pack(">I", flags & _KNOWN_FLAGS) + _OPTION.pack(_MAGICS[1], _STARTTLS, 0)
        connection.sendall(said)
        magic, option, kind, length = _REPLY.unpack(_exactly(connection, _REPLY.size))
        if (magic, option) != (_REPLY_MAGIC, _STARTTLS) or length > TEXT_BYTES_MAX:
            raise FormatError(f"{uri}: expected an answer to STARTTLS, found other bytes")
        words = _exactly(connection, length).decode("utf-8", "replace")
    except OSError as problem:
        raise LinkError(f"{uri}: no TLS: {problem}") from problem
    if kind != _ACK or length:
        raise UsageError(
            f"{uri}: expected a server that speaks TLS, it refuses ({words or kind}): name it by a "
            "Unix socket or on loopback, or let it speak TLS"
        )
