"""Two machines with addresses that others can reach: TLS with certificates on both sides, for the
link and for NBD; wrong certificates; the cable between them pulled."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.e2e.harness import MIB, Pair, run, same_bytes, wait_until
from tests.e2e.machines import ADDRESSES, Machines
from tests.e2e.nbd_client import NbdClient
from tests.e2e.pki import set_tls, write_pki

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 8 * MIB
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
pytestmark = pytest.mark.root


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Two, joined."""
    with Machines() as made:
        yield made


@pytest.fixture
def authority() -> trustme.CA:
    """Whom both sides trust."""
    return trustme.CA()


@pytest.fixture
def stopped(machines: Machines) -> Iterator[Pair]:
    """A pair on the two machines, without certificates, not yet started."""
    pair = Pair(SIZE)
    try:
        pair.move_to(machines)
        yield pair
    finally:
        pair.close()


@pytest.fixture
def running(stopped: Pair, authority: trustme.CA) -> Pair:
    """The same with certificates, started."""
    for daemon in (stopped.backup, stopped.primary):
        place = stopped.directory / f"{daemon.configuration.stem}-pki"
        set_tls(daemon, write_pki(place, authority, authority, names=ADDRESSES))
        daemon.start()
    return stopped


def nbds(pair: Pair, pki: Path) -> str:
    """The primary's export over TLS."""
    return f"nbds://{ADDRESSES[0]}:{pair.port}/v?tls-certificates={pki}"


def test_a_lost_disk_is_restored_over_tls(running: Pair, machines: Machines) -> None:
    pki = running.directory / "primary-pki"
    image = running.directory / "image.raw"
    image.write_bytes(bytes(range(256)) * (SIZE // 256))
    elsewhere = machines.both[1].inside
    run([*elsewhere, "nbdcopy", image, nbds(running, pki)])
    running.wait_mirrored()
    running.lose_disk()
    out = running.directory / "out.raw"
    run([*elsewhere, "nbdcopy", nbds(running, pki), out])
    assert same_bytes(image, out), "fetched over the link"
    running.wait_mirrored()
    running.stop_and_compare()


def test_an_export_that_others_can_reach_serves_nobody_without_a_certificate(
    running: Pair, machines: Machines
) -> None:
    elsewhere = machines.both[1].inside
    plain = f"nbd://{ADDRESSES[0]}:{running.port}/v"
    run([*elsewhere, "nbdinfo", plain], expect=1)
    stranger = write_pki(running.directory / "stranger", trustme.CA(), trustme.CA())
    run([*elsewhere, "nbdinfo", nbds(running, stranger)], expect=1)
    (running.directory / "half").mkdir()
    trusted = (running.directory / "primary-pki" / "ca-cert.pem").read_bytes()
    (running.directory / "half" / "ca-cert.pem").write_bytes(trusted)
    run([*elsewhere, "nbdinfo", nbds(running, running.directory / "half")], expect=1)
    good = nbds(running, running.directory / "primary-pki")
    (export,) = json.loads(run([*elsewhere, "nbdinfo", "--json", good]).stdout)["exports"]
    assert export["export-size"] == SIZE


@pytest.mark.parametrize(
    ("side", "wrong"),
    [
        ("primary", "stranger"),
        ("primary", "expired"),
        ("backup", "stranger"),
        ("backup", "expired"),
        ("backup", "another name"),
    ],
)
def test_a_wrong_certificate_makes_no_link_and_is_told(
    stopped: Pair, authority: trustme.CA, side: str, wrong: str
) -> None:
    for daemon in (stopped.backup, stopped.primary):
        place = stopped.directory / f"{daemon.configuration.stem}-pki"
        is_wrong = daemon.configuration.stem == side
        signer = trustme.CA() if is_wrong and wrong == "stranger" else authority
        names = ("elsewhere.example",) if is_wrong and wrong == "another name" else ADDRESSES
        until = YESTERDAY if is_wrong and wrong == "expired" else None
        set_tls(daemon, write_pki(place, signer, authority, names=names, until=until))
        daemon.start()
    wait_until("the log speaks of it", lambda: "certificate" in stopped.primary.words().lower())
    (backup,) = stopped.primary.status()["backups"]
    assert not backup["connected"]
    assert "certificate" in backup["error"], backup
    assert stopped.backup.status()["state"] == "empty"
    assert "Traceback" not in stopped.primary.words() + stopped.backup.words()


def test_a_daemon_that_others_can_reach_does_not_start_without_certificates(
    stopped: Pair,
) -> None:
    for daemon in (stopped.backup, stopped.primary):
        daemon.launch()
        assert daemon.process is not None
        assert daemon.process.wait(20) == 2
        assert "tls" in daemon.words().lower()


def test_a_pulled_cable_is_noticed_and_after_it_is_plugged_in_both_sides_are_the_same(
    running: Pair, machines: Machines
) -> None:
    running.wait_mirrored()
    machines.pull_the_cable()
    with NbdClient(running.socket, "v") as client:
        client.write(0, b"\x31" * MIB)
        client.flush()
        assert running.primary.status()["unsent_bytes"] >= MIB
        machines.plug_it_in()
        assert client.read(0, MIB) == b"\x31" * MIB
    running.wait_mirrored()
    running.stop_and_compare()
