"""Stock clients against both exports: the primary's volume and a snapshot at the backup."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, run, same_bytes
from tests.e2e.nbd_client import NbdClient

if TYPE_CHECKING:
    from pathlib import Path

    from tests.e2e.harness import Pair

SIZE = 32 * MIB


@pytest.fixture
def image(pair: Pair) -> Path:
    """Half content, half hole."""
    path = pair.directory / "image.raw"
    path.write_bytes(b"".join(bytes([1 + at % 251]) * 4096 for at in range(SIZE // 8192)))
    with path.open("r+b") as file:
        file.truncate(SIZE)
    return path


def test_nbdinfo_lists_and_describes_the_export_over_unix_and_tcp(pair: Pair) -> None:
    for uri in (pair.uri, pair.tcp_uri):
        (export,) = json.loads(run(["nbdinfo", "--json", uri]).stdout)["exports"]
        assert export["export-size"] == SIZE
        for able in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
            assert export[able] is True, able
        contexts = export["contexts"]
        assert {"base:allocation", "qemu:dirty-bitmap:missing"} <= set(contexts)
    listed = json.loads(run(["nbdinfo", "--json", "--list", f"nbd://127.0.0.1:{pair.port}"]).stdout)
    assert "v" in [export["export-name"] for export in listed["exports"]]


def test_nbdcopy_in_and_out_keeps_every_byte(pair: Pair, image: Path) -> None:
    run(["nbdcopy", image, pair.uri])
    out = pair.directory / "out.raw"
    run(["nbdcopy", "--connections=4", pair.tcp_uri, out])
    assert same_bytes(image, out)
    pair.primary.verb("verify", "v")
    assert same_bytes(image, pair.mirror_device)


def test_nbdcopy_sees_holes_through_block_status(pair: Pair, image: Path) -> None:
    run(["nbdcopy", image, pair.uri])
    extents = json.loads(run(["nbdinfo", "--json", "--map", pair.uri]).stdout)
    zero = sum(extent["length"] for extent in extents if extent["type"] & 2)
    assert zero >= SIZE // 2 - 2 * MIB, extents


def test_qemu_img_converts_and_compares(pair: Pair, image: Path) -> None:
    run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, pair.uri])
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, pair.uri])


def test_qemu_io_writes_zeroes_discards_and_reads_back(pair: Pair) -> None:
    commands = [
        "write -P 7 0 1M",
        "write -z 256k 64k",
        "discard 512k 64k",
        "write -P 9 4608 512",
        "flush",
        "read -P 7 0 4608",
        "read -P 9 4608 512",
        "read -P 7 5120 257024",
        "read -P 0 256k 64k",
        "read -P 0 512k 64k",
        "read -P 7 576k 448k",
    ]
    words = [word for command in commands for word in ("-c", command)]
    finished = run(["qemu-io", "-f", "raw", *words, pair.uri])
    assert "Pattern verification failed" not in finished.stdout, finished.stdout
    pair.primary.verb("verify", "v")


def fio(uri: str, directory: Path, *options: str) -> None:
    """Runs fio through its NBD engine."""
    fixed = ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", "--bs=4k", "--iodepth=32"]
    run([*fixed, f"--aux-path={directory}", *options])


def test_fio_verifies_random_writes_on_the_primary(pair: Pair) -> None:
    verify = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1")
    fio(pair.uri, pair.directory, "--rw=randrw", "--size=16m", *verify)
    fio(pair.tcp_uri, pair.directory, "--rw=randwrite", "--size=16m", "--bsrange=512-64k", *verify)
    pair.primary.verb("verify", "v")


def test_stock_clients_read_the_snapshot_as_it_was(pair: Pair, image: Path) -> None:
    run(["nbdcopy", image, pair.uri])
    snapshot = pair.snapshot()
    uri = pair.snapshot_uri(snapshot)
    run(["qemu-io", "-f", "raw", "-c", "write -P 99 0 32M", "-c", "flush", pair.uri])
    (export,) = json.loads(run(["nbdinfo", "--json", uri]).stdout)["exports"]
    assert export["is_read_only"] is True
    out = pair.directory / "out.raw"
    run(["nbdcopy", uri, out])
    assert same_bytes(image, out)
    run(["qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri])
    run(["qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 4k", uri])
    fio(uri, pair.directory, "--readonly", "--rw=randread", "--size=16m")


def test_a_snapshot_refuses_writes(pair: Pair) -> None:
    snapshot = pair.snapshot()
    with NbdClient(pair.backup_socket, f"v@{snapshot}") as client:
        with pytest.raises(PermissionError):
            client.write(0, bytes(4096))
        assert client.read(0, 4096) == bytes(4096), "the session goes on after the refusal"


def test_a_bundle_is_made_while_fio_writes_and_holds_the_cut(pair: Pair, image: Path) -> None:
    run(["nbdcopy", image, pair.uri])
    snapshot = pair.snapshot()
    fio(pair.uri, pair.directory, "--rw=randwrite", "--size=32m", "--io_size=8m")
    bundle = pair.bundle(snapshot)
    target = pair.directory / "target.raw"
    over = pair.directory / "over.map"
    target.write_bytes(b"\xaa" * SIZE)
    pair.primary.verb("map", "create", over, "--size", str(SIZE))
    pair.primary.verb("merge", bundle, target, "--map", over)
    assert same_bytes(image, target)
