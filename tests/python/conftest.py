"""What several files of tests need."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from dualrestore.transport.loop import LoopThread


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    """An event loop beside the test."""
    loop_thread = LoopThread("test")
    yield loop_thread
    loop_thread.stop()


@pytest.fixture
def pki(tmp_path: Path) -> Path:
    """A directory of certificates and keys for localhost."""
    return _make_pki(tmp_path / "pki")


@pytest.fixture
def other_pki(tmp_path: Path) -> Path:
    """The same of another authority."""
    return _make_pki(tmp_path / "other")


def _make_pki(place: Path) -> Path:
    """Certificates of an authority of their own."""
    place.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(place / "ca-cert.pem")
    for side in ("server", "client"):
        issued = authority.issue_cert("localhost", "127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(place / f"{side}-cert.pem")
        key = place / f"{side}-key.pem"
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
    return place
