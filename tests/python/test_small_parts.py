"""Back-off, sockets, TLS contexts, reports, pictures, metrics, progress."""

import json
import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from dualrestore.cli.commands.map import ddrescue_lines, draw
from dualrestore.cli.commands.restore import parse_lost
from dualrestore.cli.printer import Printer, size_and_share, speed, table
from dualrestore.config import Address, read_configuration
from dualrestore.errors import (
    BusyError,
    ConfigurationError,
    DeviceError,
    FormatError,
    LinkError,
    UsageError,
    error_document,
    error_from,
)
from dualrestore.model import MergeReport, PrimaryStatus, merged, read, volume_status
from dualrestore.transport.backoff import Backoff
from dualrestore.transport.sockets import OwnerSocket, listen_tcp, listen_unix
from dualrestore.transport.tls import tls_context

MERGED = {
    "bytes_written": 1,
    "bytes_skipped": 2,
    "bytes_zeroed": 3,
    "chunks_repaired": 4,
    "chunks_damaged": 5,
    "seconds": 0.5,
}


def test_backoff_doubles_up_to_its_cap_and_begins_again() -> None:
    backoff = Backoff(1.0, 5.0, chance=lambda: 1.0)
    assert [backoff.delay() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.delay() == 1.0


def test_backoff_spreads_between_half_and_whole() -> None:
    assert Backoff(2.0, 9.0, chance=lambda: 0.0).delay() == 1.0


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listen_unix(path, 0o600).close()
    with listen_unix(path, 0o600):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(BusyError, match="in use by another process"):
            listen_unix(path, 0o600)


def test_a_file_is_never_replaced_by_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(BusyError, match="another file"):
        listen_unix(path, 0o600)
    assert path.read_text() == "precious"


def test_a_port_in_use_is_busy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(BusyError, match="choose another port"):
            listen_tcp(address)


def test_an_address_of_another_machine_cannot_be_listened_at() -> None:
    with pytest.raises(DeviceError, match="cannot listen"):
        listen_tcp(Address("192.0.2.1", 10810))


def test_both_sides_demand_certificates_and_tls_1_3(pki: Path) -> None:
    sides: list[Literal["server", "client"]] = ["server", "client"]
    for side in sides:
        context = tls_context(pki, side)
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert tls_context(pki, "client").check_hostname


def test_a_key_that_others_may_read_is_refused(pki: Path) -> None:
    (pki / "server-key.pem").chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        tls_context(pki, "server")


@pytest.mark.parametrize("name", ["ca-cert.pem", "client-cert.pem", "client-key.pem"])
def test_a_missing_file_of_the_tls_directory_is_named(pki: Path, name: str) -> None:
    (pki / name).unlink()
    with pytest.raises(ConfigurationError, match=name):
        tls_context(pki, "client")


def test_a_key_of_another_certificate_is_refused(pki: Path) -> None:
    (pki / "client-key.pem").write_bytes((pki / "server-key.pem").read_bytes())
    with pytest.raises(ConfigurationError, match="belong together"):
        tls_context(pki, "client")


def test_a_report_is_read_with_keys_of_the_future_and_not_without_its_own() -> None:
    assert read(MergeReport, {**MERGED, "later": 1}).bytes_zeroed == 3
    with pytest.raises(FormatError, match="seconds"):
        read(MergeReport, {key: value for key, value in MERGED.items() if key != "seconds"})


def test_a_source_that_failed_is_raised_with_what_the_others_did() -> None:
    fields = ("bytes_total", "bytes_written", "bytes_read", "chunks_total", "chunks_repaired")
    sound = {"chunks_damaged": 0, "error": None, **dict.fromkeys(fields, 1)}
    assert merged(["a"], {**MERGED, "sources": [{**sound}]}).sources[0].source == "a"
    told = [{**sound}, {**sound, "error": LinkError("lost")}, {**sound, "error": BusyError("x")}]
    with pytest.raises(
        LinkError, match=r"b: lost; c: x \(1 of 3 sources were merged whole\)"
    ) as got:
        merged(["a", "b", "c"], {**MERGED, "sources": told})
    assert got.value.report is not None
    report = read(MergeReport, got.value.report)
    assert [one.error is None for one in report.sources] == [True, False, False]
    back = error_from(json.loads(json.dumps(error_document(got.value))))
    assert (type(back), str(back), back.report) == (LinkError, str(got.value), got.value.report)


def test_a_volume_status_is_of_its_role() -> None:
    document = {
        "role": "primary",
        "name": "v",
        "state": "mirrored",
        "volume": "u",
        "size": 1,
        "block_size": 512,
        "generation": 1,
        "current_bytes": 1,
        "missing_bytes": 0,
        "unsent_bytes": 0,
        "mirrored": True,
        "backups": [],
    }
    assert isinstance(volume_status(document), PrimaryStatus)
    with pytest.raises(FormatError):
        volume_status({**document, "role": "backup"})


def test_what_is_lost_is_all_none_or_ranges() -> None:
    assert parse_lost(("all",)) == "all"
    assert parse_lost(("none",)) == "none"
    assert parse_lost(("0-1KiB", "4KiB-8KiB")) == [(0, 1024), (4096, 4096)]
    for words in (("all", "0-1KiB"), ("all", "none"), ("everything",)):
        with pytest.raises(UsageError):
            parse_lost(words)


def test_a_picture_shows_full_and_empty_only_where_they_are() -> None:
    assert draw([0, 4096, 20480, 36864, 40960], 5 * 40960, 4096) == " .+%@"


def test_the_ddrescue_export_covers_the_whole_volume_once() -> None:
    lines = list(ddrescue_lines([(4096, 4096), (12288, 4096)], 20480))[4:]
    runs = [(int(at, 16), int(count, 16), kind) for at, count, kind in map(str.split, lines)]
    assert runs == [
        (0, 4096, "?"),
        (4096, 4096, "+"),
        (8192, 4096, "?"),
        (12288, 4096, "+"),
        (16384, 4096, "?"),
    ]


def test_a_report_goes_to_standard_output_and_nothing_else_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for as_json in (False, True):
        printer = Printer(as_json=as_json)
        with printer.progress("work") as progress:
            progress({"done_bytes": 1, "total_bytes": 2})
        printer.note("beside")
        printer.report({"a": 1}, ["a is 1"])
        captured = capsys.readouterr()
        assert captured.out == ('{"a": 1}\n' if as_json else "a is 1\n")
        assert captured.err == ("" if as_json else "beside\n")


def test_an_error_is_words_or_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    Printer(as_json=False).error("BusyError", "in use", 11)
    assert capsys.readouterr().err == "error: in use\n"
    Printer(as_json=True).error("BusyError", "in use", 11)
    assert json.loads(capsys.readouterr().err) == {
        "error": {"kind": "BusyError", "message": "in use", "exit_code": 11}
    }


def test_quantities_are_shown_for_people() -> None:
    assert table([("a", "1"), ("long", "2")]) == ["a     1", "long  2"]
    assert size_and_share(1 << 20, 4 << 20) == "1 MiB (25.0 %)"
    assert size_and_share(0, 0) == "0 B"
    assert speed(2 << 20, 2.0) == "2 MiB in 2.0 s (1 MiB/s)"


def test_records_are_documents() -> None:
    assert msgspec.json.decode(msgspec.json.encode(read(MergeReport, MERGED)))["bytes_skipped"] == 2


def test_a_process_that_reads_a_tls_key_writes_no_core_dump(pki: Path) -> None:
    script = (
        "import ctypes, resource, sys, pathlib\n"
        "from dualrestore.transport.tls import tls_context\n"
        "hard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
        "tls_context(pathlib.Path(sys.argv[1]), 'server')\n"
        "dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0], dumpable)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(pki)], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["0", "0"]


def test_an_owners_socket_turns_others_away_unheard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.sock"
    with listen_unix(path, 0o600, OwnerSocket) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()
    with listen_unix(path, 0o600, OwnerSocket) as listener, socket.socket(socket.AF_UNIX) as client:
        # We are somebody else to it: neither its user nor root.
        monkeypatch.setattr("dualrestore.transport.sockets.ROOT", os.getuid() + 1)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 2)
        client.connect(str(path))
        with pytest.raises(ConnectionAbortedError):
            listener.accept()
        assert client.recv(1) == b""


def test_the_configured_user_and_media_are_read() -> None:
    text = '[node]\nstate = "/s"\ncontrol = "/c/c.sock"\nuser = "backup"\nmedia = ["/media"]\n'
    node = read_configuration(text).node
    assert (node.user, node.media) == ("backup", (Path("/media"),))
    with pytest.raises(ConfigurationError, match="absolute"):
        read_configuration(text.replace('"/media"', '"media"'))
