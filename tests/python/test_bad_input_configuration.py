"""Configurations that say something impossible, each refused by every verb that reads one.

Does not know: what only an open device or address can tell (`tests/e2e/test_bad_input_daemons.py`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dualrestore.cli import run as run_verb
from tests.refusal import LINK_DOWN, USAGE, Ended, refused

Ask = Callable[[Sequence[object]], Ended]

NODE = """[node]
state = "/nowhere/state"
control = "/nowhere/control.sock"
"""
LISTEN = 'listen = "127.0.0.1:10810"\n'
BACKUP = '[volume.v]\nrole = "backup"\ndevice = "/nowhere/disk"\n'
PRIMARY = (
    '[volume.v]\nrole = "primary"\ndevice = "/nowhere/disk"\nbackups = ["127.0.0.1:10810/v"]\n'
)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Runs a verb in this process."""
    monkeypatch.delenv("DUALRESTORE_CONFIG", raising=False)

    def run(words: Sequence[object]) -> Ended:
        code = run_verb([str(word) for word in words])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # Unknown keys, each with the nearest known one.
        (NODE + 'stat = "/x"\n', ["[node]", "'stat'", "did you mean 'state'"]),
        (NODE + 'tsl = "/x"\n', ["[node]", "'tsl'", "did you mean 'tls'"]),
        (NODE + LISTEN + BACKUP + 'sise = "1MiB"\n', ["[volume.v]", "'sise'", "'size'"]),
        (NODE + PRIMARY + "blocksize = 4096\n", ["[volume.v]", "'blocksize'", "'block_size'"]),
        (NODE + PRIMARY + "zzz = 1\n", ["[volume.v]", "'zzz'", "known are", "mirror"]),
        (NODE + "[volumes.v]\n", ["the file", "'volumes'", "did you mean 'volume'"]),
        # Not TOML, not whole, of the wrong kind.
        ("[node\n", ["expected TOML"]),
        ("", ["node", "missing"]),
        ("[node]\n", ["state", "missing"]),
        (NODE + BACKUP.replace('"backup"', '"king"'), ["role", "king"]),
        (NODE + LISTEN + BACKUP + "size = []\n", ["size", "expected"]),
        (NODE + PRIMARY + 'mirror = "sometimes"\n', ["mirror", "sometimes"]),
        (NODE + PRIMARY + "direct = 1\n", ["direct", "expected"]),
        # Sizes and blocks.
        (NODE + LISTEN + BACKUP + "size = 1000\n", ["size", "multiple of 512", "1000"]),
        (NODE + LISTEN + BACKUP + "size = 0\n", ["size", "above zero", "0"]),
        (NODE + LISTEN + BACKUP + "size = -512\n", ["size", "above zero", "-512"]),
        (NODE + LISTEN + BACKUP + 'size = "1MB"\n', ["size", "1MB", "1MiB"]),
        (NODE + LISTEN + BACKUP + 'size = "9999999TiB"\n', ["size", "at most", "9999999TiB"]),
        (NODE + LISTEN + BACKUP + "size = 9223372036854775296000\n", ["size", "expected"]),
        (NODE + LISTEN + BACKUP + 'block_size = "3000"\n', ["block_size", "power of two", "3000"]),
        (NODE + LISTEN + BACKUP + 'block_size = "2MiB"\n', ["block_size", "power of two", "2MiB"]),
        (NODE + LISTEN + BACKUP + "block_size = 256\n", ["block_size", "power of two", "256"]),
        # Addresses and names.
        (NODE + 'listen = "10810"\n', ["expected HOST:PORT", "10810"]),
        (NODE + 'listen = "127.0.0.1:99999"\n', ["port from 1 to 65535", "99999"]),
        (NODE + 'listen = "::1:10810"\n', ["in brackets", "::1:10810"]),
        (NODE + 'listen = "0.0.0.0:10810"\n', ["0.0.0.0:10810", "expected TLS", "set tls"]),
        (NODE + PRIMARY.replace("127.0.0.1", "backup.example"), ["backup.example", "TLS"]),
        (NODE + PRIMARY.replace("/v", ""), ["HOST:PORT/NAME"]),
        (NODE + PRIMARY.replace("10810/v", "10810/../v"), ["volume name", "../v"]),
        (NODE + PRIMARY + 'export = ["/x.sock"]\n', ["unix:/PATH or tcp:HOST:PORT", "/x.sock"]),
        (NODE + PRIMARY + 'export = ["unix:x.sock"]\n', ["absolute path", "x.sock"]),
        (NODE + PRIMARY + f'export = ["unix:/{"x" * 108}"]\n', ["at most 107 bytes", "109"]),
        (NODE + PRIMARY.replace("[volume.v]", '[volume."a b"]'), ["volume name", "a b"]),
        (NODE.replace("/nowhere/state", "state"), ["state", "absolute path"]),
        (NODE.replace("/nowhere/control.sock", "c.sock"), ["control", "absolute path"]),
        # What does not fit together.
        (NODE + BACKUP, ["listen", "backup volume needs HOST:PORT"]),
        (
            NODE + PRIMARY.replace('backups = ["127.0.0.1:10810/v"]', ""),
            ["backups", "at least one"],
        ),
        (NODE + LISTEN + BACKUP + 'backups = ["127.0.0.1:1/v"]\n', ["backups", "remove the key"]),
        (NODE + PRIMARY + PRIMARY.replace("[volume.v]", "[volume.w]"), ["already the device of v"]),
        (NODE + PRIMARY + 'missing_deadline = "soon"\n', ["a unit such as", "soon"]),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_in_words(
    ask: Ask, tmp_path: Path, text: str, says: list[str]
) -> None:
    path = tmp_path / "dualrestore.toml"
    # Where one is accepted against all expectation, it stays in the test's own place.
    path.write_text(text.replace("/nowhere", str(tmp_path / "nowhere")))
    for verb in (["serve"], ["status"], ["restore", "v", "--lost", "all"]):
        refused(
            ask,
            [*verb, "-c", path],
            code=USAGE,
            kind="ConfigurationError",
            says=[str(path), *says],
            untouched=[tmp_path],
        )


def test_a_configuration_that_is_missing_or_no_text_is_refused(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "dualrestore.toml"
    says = [str(path), "cannot read the configuration", "dualrestore init"]
    for content in (None, b"\xff\xfe"):
        if content is not None:
            path.write_bytes(content)
        refused(
            ask,
            ["serve", "-c", path],
            code=USAGE,
            kind="ConfigurationError",
            says=says,
            untouched=[tmp_path],
        )


def test_no_configuration_at_all_is_refused_with_the_way_to_give_one(
    ask: Ask, tmp_path: Path
) -> None:
    for verb in (["serve"], ["status"], ["merge", tmp_path, "v"], ["verify", "v"]):
        refused(
            ask,
            verb,
            code=USAGE,
            kind="UsageError",
            says=["expected a configuration file", "found none", "-c FILE", "DUALRESTORE_CONFIG"],
            untouched=[tmp_path],
        )


def test_a_daemon_that_does_not_run_is_named(ask: Ask, tmp_path: Path) -> None:
    path = tmp_path / "dualrestore.toml"
    path.write_text(NODE.replace("/nowhere", str(tmp_path)) + PRIMARY)
    for verb in (
        ["status"],
        ["restore", "v", "--lost", "all"],
        ["snapshot", "v"],
        ["verify", "v"],
        ["map", "show", "v"],
        ["merge", tmp_path, "v"],
        ["bundle", "create", "v@x", "--to", tmp_path / "new"],
    ):
        refused(
            ask,
            [*verb, "-c", path],
            code=LINK_DOWN,
            kind="LinkError",
            says=[str(tmp_path / "control.sock"), "no daemon answers", "dualrestore serve"],
            untouched=[tmp_path],
        )
