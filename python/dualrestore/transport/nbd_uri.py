"""Names of exports as the NBD project writes them (`doc/uri.md`).

| form | the connection |
|---|---|
| `nbd://HOST[:PORT]/EXPORT` | TCP; with TLS unless it is loopback |
| `nbds://HOST[:PORT]/EXPORT` | TCP with TLS |
| `nbd+unix:///EXPORT?socket=PATH` | Unix socket |
| `nbds+unix:///EXPORT?socket=PATH` | Unix socket with TLS |

| parameter | |
|---|---|
| `socket` | of the Unix forms |
| `tls-certificates` | directory with `ca-cert.pem`, `client-cert.pem`, `client-key.pem` |
| `tls-hostname` | what the server's certificate is for, if not the host |

Guarantees: what is not understood is refused. Does not know: sockets.
"""

from pathlib import Path
from typing import NamedTuple

from dualrestore.config import Address
from dualrestore.errors import UsageError

PORT = 10809
"""That IANA has given NBD."""
SCHEMES = ("nbd", "nbds", "nbd+unix", "nbds+unix")


class NbdUri(NamedTuple):
    """An export, and the way to it. `place` is a host and port, or the path of a Unix socket."""

    text: str
    place: Address | Path
    export: str
    encrypted: bool
    """TLS, or nothing."""
    certificates: Path | None
    hostname: str

    def __str__(self) -> str:
        return self.text


def is_nbd_uri(word: str) -> bool:
    """Whether the word means an export, not a file."""
    scheme, colon, _ = word.partition(":")
    return bool(colon) and (scheme in SCHEMES or scheme.startswith(("nbd+", "nbds+")))


def parse_nbd_uri(text: str) -> NbdUri:
    """Reads one. Raises `UsageError` for what is not understood.

    >>> parse_nbd_uri("nbd+unix:///db@7f3a?socket=/run/b.sock").export
    'db@7f3a'
    """
    from urllib.parse import parse_qsl, unquote, urlsplit

    try:
        parts = urlsplit(text)
        host, port, user = parts.hostname or "", parts.port or PORT, parts.username
        pairs = parse_qsl(parts.query, strict_parsing=True, errors="strict") if parts.query else []
        export = unquote(parts.path[1:], errors="strict")
    except ValueError as problem:
        raise UsageError(f"{text}: expected an NBD URI: {problem}") from problem
    if parts.scheme not in SCHEMES:
        raise UsageError(f"{text}: expected {', '.join(SCHEMES)}, found {parts.scheme}")
    if parts.fragment or user is not None:
        raise UsageError(f"{text}: expected an NBD URI without user and fragment; leave them out")
    given = dict(pairs)
    over_unix = parts.scheme.endswith("+unix")
    known = {"tls-certificates", "tls-hostname"} | ({"socket"} if over_unix else set())
    if len(given) < len(pairs) or (unknown := given.keys() - known):
        odd = ", ".join(sorted(unknown)) if len(given) == len(pairs) else "one of them twice"
        raise UsageError(f"{text}: expected the parameters {', '.join(sorted(known))}, found {odd}")
    place: Address | Path
    if over_unix:
        place = Path(given.get("socket", ""))
        if host or not place.is_absolute():
            raise UsageError(
                f"{text}: expected {parts.scheme}:///EXPORT?socket=PATH with an absolute path"
            )
    elif host:
        place = Address(host, port)
    else:
        raise UsageError(f"{text}: expected {parts.scheme}://HOST/EXPORT, found no host")
    certificates = given.get("tls-certificates")
    return NbdUri(
        text,
        place,
        export,
        encrypted=parts.scheme.startswith("nbds"),
        certificates=None if certificates is None else Path(certificates),
        hostname=given.get("tls-hostname") or host or "localhost",
    )
