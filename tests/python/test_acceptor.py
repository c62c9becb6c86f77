"""Who connects to a link is bounded while it has not shown who it is."""

import asyncio
import socket

import pytest

from dualrestore.config import Address
from dualrestore.transport import acceptor
from dualrestore.transport.acceptor import Acceptor
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.sockets import listen_tcp

SECONDS = 20.0


class Door:
    """Welcomes whoever says a byte, with that byte; waits for the others for ever."""

    def __init__(self, thread: LoopThread) -> None:
        self.thread = thread
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = Address("127.0.0.1", probe.getsockname()[1])
        listener = listen_tcp(self.address)

        async def begin() -> Acceptor:
            return Acceptor(listener, self._welcome)

        self.acceptor = thread.call(begin())

    async def _welcome(self, client: socket.socket) -> None:
        with client:
            loop = asyncio.get_running_loop()
            said = await loop.sock_recv(client, 1)
            if said == b"!":
                raise RuntimeError("asked for")
            await loop.sock_sendall(client, said)

    def connect(self) -> socket.socket:
        """A client, of whom the door knows."""
        return socket.create_connection(self.address, SECONDS)

    def close(self) -> None:
        """Ends it and whoever waits there."""
        self.thread.call(self.acceptor.close())


def test_one_too_many_takes_the_place_of_the_one_that_waits_longest(
    thread: LoopThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "WAITING_MAX", 3)
    door = Door(thread)
    waiting = [door.connect() for _ in range(3)]
    last = door.connect()
    last.sendall(b"x")
    assert last.recv(1) == b"x"
    assert waiting[0].recv(1) == b"", "the oldest is gone"
    # The others still may say who they are.
    waiting[2].sendall(b"y")
    assert waiting[2].recv(1) == b"y"
    door.close()
    assert waiting[1].recv(1) == b"", "closing ends who waits"
    for client in (*waiting, last):
        client.close()
    with pytest.raises(ConnectionError):
        door.connect()


def test_a_welcome_that_fails_is_told_and_others_are_still_welcomed(
    thread: LoopThread, caplog: pytest.LogCaptureFixture
) -> None:
    door = Door(thread)
    with door.connect() as one, door.connect() as other:
        one.sendall(b"!")
        assert one.recv(1) == b""
        other.sendall(b"x")
        assert other.recv(1) == b"x"
    door.close()
    assert "could not be welcomed" in caplog.text
