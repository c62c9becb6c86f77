"""Links: bytes between sockets and the core, here played by a small script."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from dualrestore.config import Address, BackupAddress
from dualrestore.transport.backoff import Backoff
from dualrestore.transport.link import LinkTransport
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.tls import tls_context

SECONDS = 20.0


class Connection:
    """Says what it was given to say; keeps what it hears."""

    count = 0

    def __init__(self, say: list[bytes]) -> None:
        Connection.count += 1
        self.id = Connection.count
        self.state = "handshake"
        self.error: str | None = None
        self.refused = False
        self.label = "test"
        self.heard = bytearray()
        self.closed = threading.Event()
        self.changed = threading.Condition()
        self._say = say

    def receive(self, buffer: bytearray, length: int) -> None:
        with self.changed:
            self.state = "active"
            self.heard += memoryview(buffer)[:length]
            self.changed.notify_all()

    def take_outgoing(self, limit: int) -> bytes | None:
        assert limit > 0
        return self._say.pop(0) if self._say else None

    def tick(self) -> float:
        return 60.0

    def close(self) -> None:
        # As the core does when nobody said goodbye.
        self.error = self.error or "the connection was lost"
        self.closed.set()

    def await_bytes(self, count: int) -> bytes:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.heard) >= count, SECONDS)
            return bytes(self.heard)


class Hub:
    """Makes connections that say what `script` returns."""

    def __init__(self, script: Callable[[], list[bytes]]) -> None:
        self.connections: list[Connection] = []
        self.changed = threading.Condition()
        self.wake_descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        self._ready: list[int] = []
        self._script = script

    def _make(self) -> Connection:
        with self.changed:
            self.connections.append(Connection(self._script()))
            self.changed.notify_all()
            return self.connections[-1]

    def connect(self, *_: object) -> Connection:
        return self._make()

    def accept(self) -> Connection:
        return self._make()

    def ready(self) -> list[int]:
        os.eventfd_read(self.wake_descriptor)
        ready, self._ready = self._ready, []
        return ready

    def wake(self, connection: Connection) -> None:
        self._ready.append(connection.id)
        os.eventfd_write(self.wake_descriptor, 1)

    def await_connections(self, count: int) -> list[Connection]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.connections) >= count, SECONDS)
            return self.connections[:count]


def free_address() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return Address("127.0.0.1", probe.getsockname()[1])


Pair = tuple[LinkTransport, Hub, LinkTransport, Hub, Address]


@pytest.fixture
def make(thread: LoopThread) -> Iterator[Callable[..., Pair]]:
    made: list[LinkTransport] = []

    def both(
        client_says: Callable[[], list[bytes]],
        server_says: Callable[[], list[bytes]],
        client_pki: Path | None = None,
        server_pki: Path | None = None,
    ) -> Pair:
        client_hub, server_hub = Hub(client_says), Hub(server_says)
        client = LinkTransport(
            cast("Any", client_hub),
            thread,
            client_tls=tls_context(client_pki, "client") if client_pki else None,
        )
        server = LinkTransport(
            cast("Any", server_hub),
            thread,
            server_tls=tls_context(server_pki, "server") if server_pki else None,
        )
        address = free_address()
        server.start()
        server.listen(address)
        client.start()
        made.extend((client, server))
        return client, client_hub, server, server_hub, address

    yield both
    for transport in made:
        transport.stop()


VOLUME = cast("Any", object())


def await_error(client: LinkTransport) -> None:
    until = time.monotonic() + SECONDS
    while not client.line_errors(VOLUME, 0):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_each_class_has_a_connection_and_bytes_go_both_ways(make: Callable[..., Pair]) -> None:
    client, client_hub, server, server_hub, address = make(lambda: [b"hello"], lambda: [b"welcome"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    assert {line.link_class for line in client.lines} == {"demand", "mirror", "bulk"}
    assert [one.await_bytes(7) for one in client_hub.await_connections(3)] == [b"welcome"] * 3
    assert [one.await_bytes(5) for one in server_hub.await_connections(3)] == [b"hello"] * 3
    assert (client.bytes_sent, server.bytes_received) == (15, 15)
    assert client.line_errors(VOLUME, 0) == []


def test_much_is_carried_whole_in_order(make: Callable[..., Pair]) -> None:
    pieces = [bytes([number % 251]) * 100_000 for number in range(300)]
    client, _, _, server_hub, address = make(lambda: list(pieces), lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    whole = b"".join(pieces)
    for connection in server_hub.await_connections(3):
        assert connection.await_bytes(len(whole)) == whole


def test_what_the_core_says_later_is_sent_on_its_wake_up(make: Callable[..., Pair]) -> None:
    client, client_hub, _, server_hub, address = make(lambda: [b"a"], lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    for connection in client_hub.await_connections(3):
        connection.await_bytes(1)
        connection._say.append(b"later")
        client_hub.wake(connection)
    for connection in server_hub.await_connections(3):
        assert connection.await_bytes(6) == b"alater"


def test_a_connection_that_the_core_closed_is_made_again(make: Callable[..., Pair]) -> None:
    client, client_hub, _, server_hub, address = make(lambda: [b"a"], lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    for connection in server_hub.await_connections(3):
        connection.await_bytes(1)
        connection.state = "closed"
        server_hub.wake(connection)
        assert connection.closed.wait(SECONDS)
    assert [one.await_bytes(1) for one in client_hub.await_connections(6)] == [b"b"] * 6


def test_a_connection_that_ends_while_bytes_are_waiting_is_made_again(thread: LoopThread) -> None:
    hub = Hub(lambda: [bytes(1 << 20)] * 16)
    client = LinkTransport(cast("Any", hub), thread)
    client.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        address = Address("127.0.0.1", listener.getsockname()[1])
        client.connect(VOLUME, 0, BackupAddress(address, "v"))
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(SECONDS)
            (connection,) = hub.await_connections(1)
            assert peer.recv(1), "it speaks, and we do not listen"
            connection.state = "closed"
            hub.wake(connection)
            while peer.recv(1 << 20):
                pass
        again, _ = listener.accept()
        again.close()
        client.stop()


def test_sessions_that_end_as_soon_as_they_begin_are_tried_ever_less_often(
    make: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    class Watched(Backoff):
        def delay(self) -> float:
            pauses.append(super().delay())
            return 0.001

    monkeypatch.setattr("dualrestore.transport.link.Backoff", Watched)
    client, _, _, server_hub, address = make(lambda: [b"a"], lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    ended = 0
    while len([pause for pause in pauses if pause >= 1]) < 3:
        for connection in server_hub.await_connections(ended + 1)[ended:]:
            connection.await_bytes(1)
            connection.state = "closed"
            server_hub.wake(connection)
            ended += 1
    told = [record.message for record in caplog.records if "(mirror)" in record.message]
    assert len(told) == len(set(told)), "the same failure is told once"


def test_a_backup_that_comes_later_is_found(thread: LoopThread) -> None:
    address = free_address()
    client_hub, server_hub = Hub(lambda: [b"a"]), Hub(lambda: [b"b"])
    client = LinkTransport(cast("Any", client_hub), thread)
    server = LinkTransport(cast("Any", server_hub), thread)
    client.start()
    server.start()
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    await_error(client)
    assert "refused" in client.line_errors(VOLUME, 0)[0]
    server.listen(address)
    assert [one.await_bytes(1) for one in client_hub.await_connections(3)] == [b"b"] * 3
    client.stop()
    server.stop()


def test_demand_and_bulk_follow_the_mirror_line_into_its_session(
    make: Callable[..., Pair],
) -> None:
    said: list[list[bytes]] = [[]]
    client, client_hub, _, server_hub, address = make(lambda: [b"a"], lambda: said[0])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    (mirror,) = client_hub.await_connections(1)
    server_hub.await_connections(1)[0].await_bytes(1)
    assert len(client_hub.connections) == 1
    server_hub.connections[0]._say.append(b"welcome")
    server_hub.wake(server_hub.connections[0])
    mirror.await_bytes(7)
    client_hub.await_connections(3)


def test_a_refused_line_is_tried_again_at_once_when_something_has_changed(
    make: Callable[..., Pair],
) -> None:
    client, client_hub, _, _, address = make(lambda: [b"a"], lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    mirror = client_hub.await_connections(3)[0]
    mirror.await_bytes(1)
    mirror.refused, mirror.state = True, "failed"
    client_hub.wake(mirror)
    assert mirror.closed.wait(SECONDS)
    client.hurry(VOLUME)
    client_hub.await_connections(4)


def test_links_are_carried_over_tls(make: Callable[..., Pair], pki: Path) -> None:
    client, client_hub, _, _, address = make(lambda: [b"a"], lambda: [b"b"], pki, pki)
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    assert [one.await_bytes(1) for one in client_hub.await_connections(3)] == [b"b"] * 3


def test_a_certificate_of_another_authority_is_not_accepted(
    make: Callable[..., Pair], pki: Path, other_pki: Path
) -> None:
    client, client_hub, _, server_hub, address = make(
        lambda: [b"a"], lambda: [b"b"], other_pki, pki
    )
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    await_error(client)
    assert "certificate was not accepted" in client.line_errors(VOLUME, 0)[0]
    assert (client_hub.connections, server_hub.connections) == ([], [])


def test_a_client_without_tls_gets_nothing_from_a_server_with_it(
    make: Callable[..., Pair], pki: Path
) -> None:
    client, _, _, server_hub, address = make(lambda: [b"not TLS" * 9], lambda: [b"b"], None, pki)
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    await_error(client)
    assert "does it demand TLS" in client.line_errors(VOLUME, 0)[0]
    assert server_hub.connections == []


def test_stopping_tells_every_connection(make: Callable[..., Pair]) -> None:
    client, client_hub, _, _, address = make(lambda: [b"a"], lambda: [b"b"])
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    connections = client_hub.await_connections(3)
    for connection in connections:
        connection.await_bytes(1)
    client.stop()
    assert all(connection.closed.wait(SECONDS) for connection in connections)


def test_a_client_whose_certificate_is_refused_is_told_to_look_at_it(
    make: Callable[..., Pair], pki: Path, other_pki: Path
) -> None:
    # It trusts the server, but shows a certificate of another authority.
    (other_pki / "ca-cert.pem").write_bytes((pki / "ca-cert.pem").read_bytes())
    client, _, _, server_hub, address = make(lambda: [b"a"], lambda: [b"b"], other_pki, pki)
    client.connect(VOLUME, 0, BackupAddress(address, "v"))
    await_error(client)
    assert "does it accept our certificate" in client.line_errors(VOLUME, 0)[0]
    assert server_hub.connections == []
