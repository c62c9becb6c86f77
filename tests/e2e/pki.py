"""Certificates for a test, in a directory as the configuration wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datetime
    from pathlib import Path

    import trustme

    from tests.e2e.harness import Daemon


def write_pki(
    directory: Path,
    authority: trustme.CA,
    trusted: trustme.CA,
    *,
    names: tuple[str, ...] = ("127.0.0.1", "localhost"),
    until: datetime.datetime | None = None,
) -> Path:
    """Certificates of one authority, and another's (or its own) certificate to trust."""
    directory.mkdir()
    trusted.cert_pem.write_to_path(directory / "ca-cert.pem")
    for side in ("server", "client"):
        issued = authority.issue_cert(*names, not_after=until)
        key = directory / f"{side}-key.pem"
        key.touch(mode=0o600)
        issued.private_key_pem.write_to_path(key)
        chain = b"".join(part.bytes() for part in issued.cert_chain_pems)
        (directory / f"{side}-cert.pem").write_bytes(chain)
    return directory


def set_tls(daemon: Daemon, pki: Path) -> None:
    """Names the directory in the daemon's configuration."""
    text = daemon.configuration.read_text()
    daemon.configuration.write_text(text.replace("[node]\n", f'[node]\ntls = "{pki}"\n'))
