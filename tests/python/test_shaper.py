"""The thin link in user space."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from dualrestore.config import Address
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.shaper import Direction, ShapedLink


@pytest.fixture
def far_end() -> Iterator[Address]:
    """Sends everything back until the sender has finished."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(client: socket.socket) -> None:
        with client:
            while data := client.recv(65536):
                client.sendall(data)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    accepter = threading.Thread(target=accept, daemon=True)
    accepter.start()
    yield Address("127.0.0.1", listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepter.join()


@pytest.fixture
def link(thread: LoopThread, far_end: Address) -> Iterator[tuple[ShapedLink, Address]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        near = Address("127.0.0.1", probe.getsockname()[1])
    shaped = ShapedLink(thread, far_end)
    shaped.open(near)
    yield shaped, near
    shaped.close()


def _exchange(near: Address, data: bytes) -> bytes:
    with socket.create_connection((near.host, near.port), 10) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        while piece := client.recv(65536):
            received += piece
        sender.join()
    return bytes(received)


def test_bytes_arrive_whole_in_order_and_counted(link: tuple[ShapedLink, Address]) -> None:
    shaped, near = link
    data = bytes(range(256)) * 4096
    assert _exchange(near, data) == data
    assert shaped.bytes_carried == 2 * len(data)


def test_bytes_arrive_whole_over_a_thin_link(link: tuple[ShapedLink, Address]) -> None:
    shaped, near = link
    shaped.shape(20e6, 0.005)
    data = bytes(range(256)) * 1024
    assert _exchange(near, data) == data


def test_no_byte_arrives_before_its_delay(link: tuple[ShapedLink, Address]) -> None:
    shaped, near = link
    shaped.shape(1e9, 0.05)
    began = time.monotonic()
    assert _exchange(near, b"x") == b"x"
    assert time.monotonic() - began >= 0.1


def test_many_connections_share_one_link(link: tuple[ShapedLink, Address]) -> None:
    shaped, near = link
    shaped.shape(50e6, 0.001)
    results: list[bool] = []
    data = b"abc" * 20000
    threads = [
        threading.Thread(target=lambda: results.append(_exchange(near, data) == data))
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert results == [True] * 4


def test_the_wire_is_taken_once_at_a_time() -> None:
    direction = Direction()
    direction.rate = 1000.0
    assert direction.reserve(100, 10.0) == pytest.approx(10.1, abs=0.005)
    assert direction.reserve(100, 10.0) == pytest.approx(10.2, abs=0.005)
    assert direction.reserve(100, 20.0) == pytest.approx(20.1, abs=0.005)


def test_a_vanished_far_end_closes_the_near_one(thread: LoopThread) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        nobody = Address("127.0.0.1", one.getsockname()[1])
        near = Address("127.0.0.1", two.getsockname()[1])
    shaped = ShapedLink(thread, nobody)
    shaped.open(near)
    with socket.create_connection((near.host, near.port), 10) as client:
        assert client.recv(1) == b""
    shaped.close()
