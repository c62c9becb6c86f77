"""TLS for links and exports, from a directory laid out as nbdkit and qemu do.

| file | for |
|---|---|
| `ca-cert.pem` | whom to trust |
| `server-cert.pem`, `server-key.pem` | what listens |
| `client-cert.pem`, `client-key.pem` | what connects |

Guarantees: TLS 1.3 only; each side must show a certificate of that authority, and a server's must
name its host; a key that others may read is refused; a process that holds one writes no core dump.
"""

import ssl
import stat
from pathlib import Path
from typing import Literal

from dualrestore.errors import ConfigurationError


def _file(directory: Path, name: str) -> Path:
    path = directory / name
    if not path.is_file():
        raise ConfigurationError(
            f"{path}: expected a file in the tls directory, found none; it needs ca-cert.pem and "
            f"the certificate and key of the side ({name})"
        )
    return path


def _key(directory: Path, name: str) -> Path:
    path = _file(directory, name)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigurationError(
            f"{path}: expected a key that only its owner may read (0600), found {mode:04o}; "
            f"run: chmod 600 {path}"
        )
    return path


def tls_context(directory: Path, side: Literal["server", "client"]) -> ssl.SSLContext:
    """What this side needs to speak TLS 1.3 with certificates both ways."""
    from dualrestore.core import guard_secrets

    protocol = ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT
    authority = _file(directory, "ca-cert.pem")
    certificate = _file(directory, f"{side}-cert.pem")
    key = _key(directory, f"{side}-key.pem")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = side == "client"
    # Tickets would let a session outlive a change of certificates.
    context.options |= ssl.OP_NO_TICKET
    guard_secrets()
    try:
        context.load_verify_locations(cafile=str(authority))
        context.load_cert_chain(str(certificate), str(key))
    except (ssl.SSLError, OSError) as problem:
        raise ConfigurationError(
            f"{directory}: expected PEM certificates and keys that belong together, "
            f"found: {problem}"
        ) from problem
    return context


def tls_parts(directory: Path) -> tuple[bytes, bytes, bytes]:
    """What the core needs to serve over TLS: authority, certificate and key, as PEM."""
    files = (
        _file(directory, "ca-cert.pem"),
        _file(directory, "server-cert.pem"),
        _key(directory, "server-key.pem"),
    )
    authority, certificate, key = (path.read_bytes() for path in files)
    return authority, certificate, key
