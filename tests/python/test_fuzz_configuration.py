"""Whatever stands in a configuration file, it is a configuration within its limits or an error in
words. Begins from `fuzz/corpus/configuration`; `DUALRESTORE_FUZZ_ROUNDS` sets how much is tried."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dualrestore.config import (
    PORT_MAX,
    UNIX_PATH_BYTES_MAX,
    Configuration,
    TcpExport,
    UnixExport,
    load_configuration,
    read_configuration,
)
from dualrestore.errors import ConfigurationError
from dualrestore.sizes import SIZE_MAX

CORPUS = sorted((Path(__file__).parents[2] / "fuzz/corpus/configuration").glob("*.toml"))
ROUNDS = int(os.environ.get("DUALRESTORE_FUZZ_ROUNDS") or 600)
SETTINGS = settings(
    max_examples=ROUNDS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
GOOD = [path.read_text() for path in CORPUS if path.stem.startswith("good")]

WORDS = [
    "[node]", "[volume.v]", '[volume."../v"]', "[[volume]]", "state", "control", "listen", "tls",
    "user", "media", "role", "device", "size", "block_size", "backups", "export", "mirror",
    "async_bytes", "async_seconds",
    "missing_deadline", "direct", '"primary"', '"backup"', '"/x"', '"x"', '""', "0", "-1", "true",
    "1e309", "nan", "9" * 40, "0x" + "f" * 20, '"4KiB"', '"9EiB"', '"-4KiB"', '"[::1]:1"',
    '"127.0.0.1:0/v"', '"[::1:1/v"', '"unix:/x"', '"tcp:0.0.0.0:1"', '"30s"', '"1e400s"',
    "1979-05-27", "9" * 5000,
    "[", "]", "{", "}", "=", ",", "\n", "#", "'''", '"""', "\\u0000", "\\U0010ffff", "\x7f", "é",
]  # fmt: skip


def check(text: str) -> Configuration | None:
    """A configuration inside its limits, or an error in words."""
    try:
        found = read_configuration(text)
    except ConfigurationError:
        return None
    assert found.node.state.is_absolute()
    assert all(place.is_absolute() for place in found.node.media or ())
    addresses = [found.node.listen] if found.node.listen else []
    sockets = [found.node.control]
    for volume in found.volumes:
        assert "/" not in volume.name
        assert volume.name not in {"", ".", ".."}
        assert volume.device.is_absolute()
        assert volume.block_size & (volume.block_size - 1) == 0
        assert volume.size is None or 0 < volume.size <= SIZE_MAX
        assert 0 <= volume.missing_deadline_ms < 2**63
        addresses += [backup.address for backup in volume.backups]
        addresses += [one.address for one in volume.exports if isinstance(one, TcpExport)]
        sockets += [one.path for one in volume.exports if isinstance(one, UnixExport)]
    assert all(0 < address.port <= PORT_MAX for address in addresses)
    assert found.node.tls or all(address.is_loopback for address in addresses)
    assert all(len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX for path in sockets)
    return found


@pytest.mark.parametrize("path", CORPUS, ids=[path.stem for path in CORPUS])
def test_what_once_broke_or_is_rare_is_answered(path: Path) -> None:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        with pytest.raises(ConfigurationError):
            load_configuration(path)
        return
    assert (check(text) is not None) == path.stem.startswith("good")


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A good file with pieces taken out, put in, doubled and exchanged."""
    text = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 12)))
        piece = draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=8), st.just(text[:end])))
        text = text[:begin] + piece + text[end:]
    return text


@given(mutated())
@SETTINGS
def test_a_mutated_file_is_read_or_refused_in_words(text: str) -> None:
    check(text)


@given(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))
@SETTINGS
def test_words_in_any_order_are_read_or_refused_in_words(text: str) -> None:
    check(text)


@given(st.sampled_from("[{"), st.integers(100, 100_000))
@settings(SETTINGS, max_examples=20)
def test_any_depth_is_refused_in_words(bracket: str, depth: int) -> None:
    piece = "[" if bracket == "[" else "{a="
    assert check("a = " + piece * depth) is None


@given(st.binary(max_size=200))
@settings(SETTINGS, max_examples=100)
def test_any_bytes_are_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        load_configuration(path)
