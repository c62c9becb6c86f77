"""What an NBD client may say before TLS."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualrestore.transport.nbd_plain import GREETING, OPTIONS_MAX, PlainNegotiation

FLAGS = struct.pack(">I", 3)
STARTTLS, ABORT, EXPORT_NAME, LIST, GO = 5, 2, 1, 3, 7


def option(number: int, payload: bytes = b"") -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, number, len(payload)) + payload


def reply_kind(answer: bytes) -> int:
    magic, _, kind, length = struct.unpack(">QIII", answer)
    assert (magic, length) == (0x3E889045565A9, 0)
    return int(kind)


def negotiated(*said: bytes) -> tuple[PlainNegotiation, bytes]:
    negotiation = PlainNegotiation()
    answer = b"".join(negotiation.receive(words) for words in said)
    return negotiation, answer


def test_the_greeting_is_that_of_fixed_newstyle() -> None:
    assert GREETING == b"NBDMAGICIHAVEOPT\0\3"


def test_starttls_is_acknowledged_and_ends_the_plain_phase() -> None:
    negotiation, answer = negotiated(FLAGS, option(STARTTLS))
    assert negotiation.state == "tls"
    assert reply_kind(answer) == 1
    assert negotiation.client_flags == FLAGS


def test_bytes_behind_starttls_close_the_connection() -> None:
    negotiation, answer = negotiated(FLAGS, option(STARTTLS) + b"\x16")
    assert (negotiation.state, answer) == ("closed", b"")


@pytest.mark.parametrize("number", [LIST, 6, GO, 8, 9, 10, 11, 99])
@pytest.mark.parametrize("payload", [b"", b"\0" * 12])
def test_every_other_option_is_told_that_tls_is_required(number: int, payload: bytes) -> None:
    negotiation, answer = negotiated(FLAGS, option(number, payload))
    assert negotiation.state == "options"
    assert reply_kind(answer) == 2**31 + 5


def test_export_name_closes_because_it_has_no_error_reply() -> None:
    negotiation, answer = negotiated(FLAGS, option(EXPORT_NAME, b"v"))
    assert (negotiation.state, answer) == ("closed", b"")


def test_abort_is_acknowledged_and_closes() -> None:
    negotiation, answer = negotiated(FLAGS, option(ABORT))
    assert negotiation.state == "closed"
    assert reply_kind(answer) == 1


def test_starttls_with_a_payload_is_invalid_and_may_be_tried_again() -> None:
    negotiation, answer = negotiated(FLAGS, option(STARTTLS, b"x"))
    assert reply_kind(answer) == 2**31 + 3
    assert reply_kind(negotiation.receive(option(STARTTLS))) == 1
    assert negotiation.state == "tls"


@pytest.mark.parametrize("flags", [0, 2, 4, 7, 2**32 - 1])
def test_unknown_client_flags_close(flags: int) -> None:
    negotiation, _ = negotiated(struct.pack(">I", flags))
    assert negotiation.state == "closed"


def test_a_wrong_magic_closes() -> None:
    negotiation, _ = negotiated(FLAGS, b"\0" * 16)
    assert negotiation.state == "closed"


def test_a_huge_option_closes_before_its_payload_is_held() -> None:
    header = struct.pack(">QII", 0x49484156454F5054, GO, 2**32 - 1)
    negotiation, _ = negotiated(FLAGS, header)
    assert negotiation.state == "closed"


def test_options_without_end_close() -> None:
    negotiation, _ = negotiated(FLAGS, option(LIST) * (OPTIONS_MAX + 1))
    assert negotiation.state == "closed"


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_no_bytes_whatever_raise(said: list[bytes]) -> None:
    negotiation, _ = negotiated(*said)
    assert negotiation.state in {"flags", "options", "tls", "closed"}


@given(st.integers(1, 19))
def test_how_the_bytes_are_sliced_does_not_matter(step: int) -> None:
    said = FLAGS + option(GO, b"\0\0\0\1v\0\0") + option(STARTTLS)
    whole, answer = negotiated(said)
    sliced, sliced_answer = negotiated(*(said[at : at + step] for at in range(0, len(said), step)))
    assert (whole.state, answer) == (sliced.state, sliced_answer)
    assert whole.state == "tls"
