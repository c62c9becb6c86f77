"""Links and exports under TLS 1.3 with certificates on both sides; a wrong one is refused."""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.e2e.harness import MIB, Pair, run, same_bytes, wait_until
from tests.e2e.pki import set_tls, write_pki

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def authority() -> trustme.CA:
    """Whom both sides trust."""
    return trustme.CA()


@pytest.fixture
def stopped(authority: trustme.CA) -> Iterator[Pair]:
    """A pair whose backup has its certificates, not yet started."""
    pair = Pair(8 * MIB)
    try:
        set_tls(pair.backup, write_pki(pair.directory / "backup-pki", authority, authority))
        yield pair
    finally:
        pair.close()


def test_a_volume_is_mirrored_over_tls(stopped: Pair, authority: trustme.CA) -> None:
    set_tls(stopped.primary, write_pki(stopped.directory / "pki", authority, authority))
    stopped.backup.start()
    stopped.primary.start()
    run(["qemu-io", "-f", "raw", "-c", "write -P 5 0 8M", "-c", "flush", stopped.uri])
    stopped.wait_mirrored()
    stopped.stop_and_compare()


def test_a_certificate_of_another_authority_is_refused_in_words(
    stopped: Pair, authority: trustme.CA
) -> None:
    stranger = trustme.CA()
    set_tls(stopped.primary, write_pki(stopped.directory / "pki", stranger, authority))
    stopped.backup.start()
    stopped.primary.start()
    wait_until("the log speaks of it", lambda: "certificate" in stopped.primary.words().lower())
    status = stopped.primary.status()
    assert not status["backups"][0]["connected"], status
    assert "Traceback" not in stopped.primary.words() + stopped.backup.words()


def test_a_client_without_tls_gets_nothing(stopped: Pair) -> None:
    stopped.backup.start()
    stopped.primary.start()
    status = stopped.primary.status()
    assert not status["backups"][0]["connected"], status
    with socket.create_connection(("127.0.0.1", stopped.link_port), timeout=10) as plain:
        plain.sendall(bytes(4096))
        while plain.recv(4096):
            pass


def test_tls_below_1_3_is_refused(stopped: Pair, authority: trustme.CA) -> None:
    stopped.backup.start()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", stopped.link_port), timeout=10) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol"),
        context.wrap_socket(plain, server_hostname="127.0.0.1"),
    ):
        pass


def test_a_key_that_others_may_read_is_refused(stopped: Pair) -> None:
    key = stopped.directory / "backup-pki" / "server-key.pem"
    key.chmod(0o644)
    stopped.backup.launch()
    assert stopped.backup.process is not None
    assert stopped.backup.process.wait(20) != 0
    assert "server-key.pem" in stopped.backup.words()


def test_stock_clients_use_an_export_over_tls_that_is_for_them(
    stopped: Pair, authority: trustme.CA
) -> None:
    pki = write_pki(stopped.directory / "pki", authority, authority, names=("127.0.0.1", "ops"))
    set_tls(stopped.primary, pki)
    text = stopped.primary.configuration.read_text()
    stopped.primary.configuration.write_text(text + 'allow = ["ops"]\n')
    stopped.backup.start()
    stopped.primary.start()
    image = stopped.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (8 * MIB // 256))
    place = f"127.0.0.1:{stopped.port}/v"
    uri = f"nbds://{place}?tls-certificates={pki}"
    run(["nbdcopy", "--connections=4", "--flush", image, uri])
    assert '"protocol": "newstyle-fixed"' in run(["nbdinfo", "--json", uri]).stdout
    options = f"driver=nbd,host=127.0.0.1,port={stopped.port},export=v,tls-creds=t"
    credentials = f"tls-creds-x509,id=t,endpoint=client,dir={pki}"
    run(["qemu-img", "info", "--object", credentials, "--image-opts", options])
    stopped.wait_mirrored()
    assert same_bytes(image, stopped.mirror_device)
    # Loopback in the clear, and another certificate of the same authority.
    run(["nbdinfo", "--size", f"nbd://{place}"], expect=1)
    other = write_pki(stopped.directory / "other", authority, authority, names=("127.0.0.1",))
    refused = run(["nbdinfo", "--size", f"nbds://{place}?tls-certificates={other}"], expect=1)
    assert "no export named" in refused.stderr
    # Over the Unix socket the permissions of the file decide.
    run(["nbdinfo", "--size", stopped.uri])
