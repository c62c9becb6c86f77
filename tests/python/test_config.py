"""The configuration file."""

from pathlib import Path

import pytest

from dualrestore.cli.commands.init import starter
from dualrestore.config import (
    Address,
    TcpExport,
    UnixExport,
    check_name,
    configured_path,
    load_configuration,
    parse_address,
    parse_backup,
    parse_export,
    read_configuration,
)
from dualrestore.errors import ConfigurationError, UsageError

NODE = '[node]\nstate = "/s"\ncontrol = "/c.sock"\n'
PRIMARY = '[volume.v]\nrole = "primary"\ndevice = "/d"\nbackups = ["127.0.0.1:1/v"]\n'
TLS, EXPORT = 'tls = "/pki"\n', 'export = ["tcp:127.0.0.1:10809"]\n'
BACKUP = '[volume.v]\nrole = "backup"\ndevice = "/d"\n'


def test_a_primary_is_read_with_its_defaults() -> None:
    [volume] = read_configuration(NODE + PRIMARY + 'size = "1GiB"\n').volumes
    assert (volume.size, volume.block_size, volume.mirror) == (1 << 30, 4096, "flush")
    assert volume.missing_deadline_ms == 30_000
    assert str(volume.backups[0]) == "127.0.0.1:1/v"


def test_how_far_an_asynchronous_backup_may_lag_is_read_in_bytes_and_seconds() -> None:
    [volume] = read_configuration(NODE + PRIMARY + 'mirror = "async"\n').volumes
    assert (volume.async_bytes, volume.async_ms) == (64 << 20, 5_000)
    bound = 'mirror = "async"\nasync_bytes = "1MiB"\nasync_seconds = 0.5\n'
    [volume] = read_configuration(NODE + PRIMARY + bound).volumes
    assert (volume.async_bytes, volume.async_ms) == (1 << 20, 500)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        (NODE + PRIMARY + 'blocksize = "4KiB"\n', "'block_size'"),
        (NODE + PRIMARY + 'exports = ["unix:/x"]\n', "'export'"),
        (NODE + 'lisen = "127.0.0.1:1"\n', "'listen'"),
        (NODE + "[volumes.v]\n", "'volume'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(text: str, nearest: str) -> None:
    with pytest.raises(ConfigurationError, match=f"unknown key .* did you mean {nearest}"):
        read_configuration(text)


def test_a_key_unlike_any_other_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="known are state, control, listen, tls"):
        read_configuration(NODE + "zzz = 1\n")


@pytest.mark.parametrize(
    "line",
    [
        'size = "1000"',
        'size = "0"',
        'size = "1MB"',
        "size = -512",
        'block_size = "5KiB"',
        'block_size = "256"',
        'block_size = "2MiB"',
        'mirror = "sometimes"',
        'export = ["v.sock"]',
        'export = ["unix:relative"]',
        'export = ["tcp:0.0.0.0:10809"]',
        f'export = ["unix:/{"x" * 120}"]',
        'missing_deadline = "soon"',
        'mirror = "async"\nasync_bytes = "1KiB"',
        'mirror = "async"\nasync_seconds = 0',
        'mirror = "async"\nasync_seconds = "5s"',
        'mirror = "flush"\nasync_bytes = "1MiB"',
        "async_seconds = 5",
        "direct = 1",
    ],
)
def test_an_impossible_value_is_refused(line: str) -> None:
    with pytest.raises(ConfigurationError):
        read_configuration(NODE + PRIMARY + line + "\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing required field `node`"),
        ("[node", "expected TOML"),
        (NODE + BACKUP, "listen"),
        (NODE + BACKUP + 'backups = ["127.0.0.1:1/v"]\n', "only a primary"),
        (NODE + '[volume.v]\nrole = "primary"\ndevice = "/d"\n', "at least one"),
        (NODE + '[volume."a/b"]\nrole = "backup"\ndevice = "/d"\n', "volume name"),
        (NODE + '[volume.v]\nrole = "backup"\ndevice = "d"\n', "absolute path"),
        (NODE.replace("/s", "s"), "absolute path"),
        (NODE + PRIMARY.replace("127.0.0.1", "backup.example"), "expected TLS"),
        (NODE + 'listen = "0.0.0.0:10810"\n', "expected TLS"),
        (NODE + 'listen = "[::]:10810"\n', "expected TLS"),
        (NODE + PRIMARY + EXPORT + 'allow = ["x"]\n', "allow: expected tls"),
        (NODE + TLS + PRIMARY + 'allow = ["x"]\n', "allow: expected a tcp: export"),
        (NODE + TLS + PRIMARY + EXPORT + 'allow = ["sha256:12"]\n', "64 hexadecimal digits"),
        (NODE + TLS + PRIMARY + EXPORT + 'allow = [""]\n', "expected the name of a certificate"),
        (NODE + TLS + PRIMARY + EXPORT + 'allow = ["a\\nb"]\n', "expected the name of a"),
    ],
)
def test_an_impossible_file_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_configuration(text)


def test_two_volumes_of_one_device_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="already the device of v"):
        read_configuration(NODE + PRIMARY + PRIMARY.replace("volume.v", "volume.w"))


def test_a_reachable_address_is_accepted_with_tls() -> None:
    text = NODE + 'listen = "0.0.0.0:10810"\ntls = "/pki"\n' + BACKUP
    assert read_configuration(text).node.listen == parse_address("0.0.0.0:10810")


def test_a_volume_may_be_for_those_who_show_certain_certificates() -> None:
    digits = ":".join(["aB"] * 32)
    allow = f'allow = ["db1.example", "sha256:{digits}"]\n'
    [volume] = read_configuration(NODE + TLS + PRIMARY + EXPORT + allow).volumes
    assert volume.allow == ("db1.example", f"sha256:{digits}")
    [volume] = read_configuration(NODE + PRIMARY).volumes
    assert volume.allow is None


@pytest.mark.parametrize("role", ["primary", "backup"])
def test_the_starter_configuration_is_accepted(role: str) -> None:
    [volume] = read_configuration(starter(role)).volumes
    assert volume.role == role


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("127.0.0.1:10810", "127.0.0.1", 10810, "127.0.0.1:10810"),
        ("[::1]:1", "::1", 1, "[::1]:1"),
        ("backup.example:65535", "backup.example", 65535, "backup.example:65535"),
    ],
)
def test_an_address_is_read_and_written(text: str, host: str, port: int, written: str) -> None:
    address = parse_address(text)
    assert (address.host, address.port, str(address)) == (host, port, written)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "::1:1", "[x]:1", "host:1x"]
)
def test_a_word_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_address(text)


def test_only_this_machine_is_loopback() -> None:
    hosts = ["127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.1", "::", "10.0.0.1", "example"]
    found = [Address(host, 1).is_loopback for host in hosts]
    assert found == [True, True, True, True, False, False, False, False]


def test_backups_and_exports_are_read() -> None:
    assert parse_backup("[::1]:5/db").name == "db"
    assert parse_export("unix:/run/db.sock") == UnixExport(Path("/run/db.sock"))
    assert parse_export("tcp:[::1]:10809") == TcpExport(Address("::1", 10809))
    with pytest.raises(ConfigurationError):
        parse_backup("127.0.0.1:1")


@pytest.mark.parametrize("name", ["", "a@b", "../x", "a/b", ".hidden", "x" * 65, "\u00e4", "a\0b"])
def test_a_name_that_could_mean_something_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        check_name(name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.toml: cannot read"):
        load_configuration(tmp_path / "none.toml")


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.toml"
    path.write_text(NODE + "zzz = 1\n")
    with pytest.raises(ConfigurationError, match=r"some\.toml: "):
        load_configuration(path)


def test_the_option_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALRESTORE_CONFIG", "/from/environment")
    assert configured_path("/from/option") == Path("/from/option")
    assert configured_path(None) == Path("/from/environment")
    monkeypatch.delenv("DUALRESTORE_CONFIG")
    with pytest.raises(UsageError):
        configured_path(None)
