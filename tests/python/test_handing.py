"""Standard input handed to a daemon."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dualrestore.errors import LinkError, LockedError, UsageError
from dualrestore.transport import handing
from dualrestore.transport.handing import HandedStream, Handing, Reception
from dualrestore.transport.loop import LoopThread
from tests.python.live_pair import wait_until

WRAPPED = b"age-encryption.org/v1\n" + bytes(5000)


class Desk:
    """A reception on a loop of its own."""

    def __init__(self, place: Path) -> None:
        self.control = place / "control"
        self.thread = LoopThread("desk")
        self.reception = Reception(handing.handing_path(self.control))
        self.on_loop(self.reception.open)

    def on_loop(self, call: Callable[..., object], *words: object) -> object:
        """Runs it there."""

        async def run() -> object:
            return call(*words)

        return self.thread.call(run())

    def claim(self, token: str) -> HandedStream:
        """What was handed over."""
        claimed = self.on_loop(self.reception.claim, token)
        assert isinstance(claimed, HandedStream)
        return claimed

    def close(self) -> None:
        """Ends it all."""
        self.on_loop(self.reception.close)
        self.thread.stop()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """See the class."""
    made = Desk(tmp_path)
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its two ends; the reading one is closed by the test."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(writing)


def is_read_by_nobody(writing: int) -> bool:
    """Whether the pipe has no reader any more."""
    try:
        os.write(writing, b"x")
    except BrokenPipeError:
        return True
    return False


def test_the_daemon_reads_the_very_pipe_and_lets_go_of_it(
    desk: Desk, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    with Handing(desk.control, reading, None) as handed:
        os.close(reading)
        stream = desk.claim(handed.token)
        os.write(writing, b"said")
        assert os.read(stream.descriptor, 16) == b"said"
        assert not os.get_inheritable(stream.descriptor)
        with pytest.raises(UsageError, match="handed over"):
            desk.claim(handed.token)
        stream.close()
        stream.close()
    assert is_read_by_nobody(writing)


def test_what_nobody_asked_for_is_dropped_with_its_client(
    desk: Desk, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    with Handing(desk.control, reading, None) as handed:
        os.close(reading)
        assert not is_read_by_nobody(writing)
    wait_until("dropped", lambda: is_read_by_nobody(writing))
    with pytest.raises(UsageError, match="handed over"):
        desk.claim(handed.token)


def test_the_client_opens_the_key_or_says_why_it_does_not(
    desk: Desk, pipe: tuple[int, int]
) -> None:
    def refuse(wrapped: bytes) -> bytes:
        raise LockedError(f"no key for {len(wrapped)} bytes")

    reading, _ = pipe
    for unwrap, answer in (
        (lambda wrapped: wrapped[:22], "age-encryption"),
        (refuse, "no key for 5022 bytes"),
        (None, "found none"),
    ):
        with Handing(desk.control, reading, unwrap) as handed:
            stream = desk.claim(handed.token)
            try:
                said = stream.unlock(WRAPPED).decode()
            except LockedError as problem:
                said = str(problem)
            assert answer in said
            stream.close()
    os.close(reading)


def test_a_client_that_dies_before_it_gives_the_key_is_an_error(
    desk: Desk, pipe: tuple[int, int]
) -> None:
    reading, _ = pipe
    with Handing(desk.control, reading, None) as handed:
        stream = desk.claim(handed.token)
    with pytest.raises(LinkError, match="gives no key"):
        stream.unlock(WRAPPED)
    stream.close()
    os.close(reading)


@pytest.mark.parametrize("descriptors", [0, 2])
@pytest.mark.parametrize("said", [b"short", bytes(16)])
def test_what_is_no_handing_over_is_closed_and_nothing_is_kept(
    desk: Desk, pipe: tuple[int, int], descriptors: int, said: bytes
) -> None:
    reading, writing = pipe
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(handing.handing_path(desk.control)))
        client.settimeout(30)
        socket.send_fds(client, [said], [reading] * descriptors)
        os.close(reading)
        assert client.recv(16) == b""
    wait_until("closed", lambda: is_read_by_nobody(writing))


def test_without_a_daemon_there_is_a_word_about_it(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match="standard input"), Handing(tmp_path / "none", 0, None):
        pass


def test_the_socket_is_for_its_owner_only_and_goes_with_the_daemon(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    path = handing.handing_path(desk.control)
    assert path.stat().st_mode & 0o777 == 0o600
    desk.close()
    assert not path.exists()
