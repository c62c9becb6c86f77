"""An encrypted, signed bundle from daemon to daemon: its key goes over control sockets only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.harness import MIB, run, wait_until

if TYPE_CHECKING:
    from tests.e2e.harness import Pair


def _held_by(process_id: int, secret: bytes) -> bool:
    """Whether a file that the process has open, or a line of its arguments, holds the bytes."""
    place = Path(f"/proc/{process_id}")
    return secret in (place / "cmdline").read_bytes() + (place / "environ").read_bytes()


def medium_of(pair: Pair) -> dict[str, Any]:
    """The one that is attached, or was."""
    [medium] = pair.primary.status()["media"]
    found: dict[str, Any] = medium
    return found


def forget_and_attach_again(pair: Pair, bundle: Path, identity: Path) -> None:
    """The key never lies on a disk in the clear: after a restart it is asked for again."""
    pair.primary.stop()
    pair.primary.start()
    wait_until("it was looked for", lambda: medium_of(pair)["state"] != "opening")
    assert medium_of(pair)["state"] == "refused"
    assert "its key is not kept over a restart: attach it again" in medium_of(pair)["error"]
    shown = pair.primary.verb("status").stdout
    assert f"medium {bundle}: REFUSED" in shown
    assert "attach it again with --identity or --passphrase-file" in shown
    supplied = pair.primary.status()["bytes_from_media"]
    run(["qemu-io", "-f", "raw", "-c", "read 1M 1M", pair.uri])
    assert pair.primary.status()["bytes_from_media"] == supplied
    pair.primary.verb("attach", bundle, "v", "--identity", identity)
    run(["qemu-io", "-f", "raw", "-c", "read 2M 1M", pair.uri])
    assert pair.primary.status()["bytes_from_media"] >= supplied + MIB


def test_a_travelling_disk_is_encrypted_signed_and_merged_under_live_io(pair: Pair) -> None:
    image = pair.directory / "image.raw"
    image.write_bytes(os.urandom(4 * MIB) + bytes(pair.size - 4 * MIB))
    run(["nbdcopy", image, pair.uri])
    pair.wait_mirrored()
    pair.lose_disk()
    identity, key = pair.directory / "identity.txt", pair.directory / "signing"
    run(["age-keygen", "-o", identity])
    recipient = run(["age-keygen", "-y", identity]).stdout.strip()
    run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key])
    signers = pair.directory / "signers"
    signers.write_text(f"operator {key.with_suffix('.pub').read_text()}")
    bundle = pair.directory / "travels.drb"
    words: list[str | Path] = ["--to", bundle, "--recipient", recipient, "--sign", key]
    report = pair.backup.verb_json("bundle", "create", f"v@{pair.snapshot()}", *words)
    assert report["encrypted"] is True
    line = run(["age", "-d", "-i", identity, bundle / "key.age"]).stdout
    assert pair.primary.verb("merge", bundle, "v", expect=5).stdout == ""
    pair.primary.verb("attach", bundle, "v", expect=5)
    pair.primary.verb("attach", bundle, "v", "--identity", identity)
    run(["qemu-io", "-f", "raw", "-c", "read 0 1M", pair.uri])
    assert pair.primary.status()["bytes_from_media"] >= MIB
    forget_and_attach_again(pair, bundle, identity)
    missing = pair.primary.status()["missing_bytes"]
    pair.primary.verb("merge", bundle, "v", "--identity", identity, "--signers", signers)
    assert missing > pair.primary.status()["missing_bytes"] == 0
    secret = line.split()[2]
    for node in (pair.primary, pair.backup):
        told = node.verb("status", "--json").stdout
        assert secret not in told
        assert "AGE-SECRET" not in told
        process = node.process
        assert process is not None
        assert not _held_by(process.pid, secret.encode())
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        (core,) = [row for row in limits.splitlines() if row.startswith("Max core file size")]
        assert core.split()[4] == "0"
    for path in pair.directory.rglob("*"):
        if path.is_file() and path.stat().st_size < 4 * MIB:
            assert secret.encode() not in path.read_bytes(), path
    pair.wait_mirrored()
    pair.stop_and_compare()
    assert pair.primary_device.read_bytes() == image.read_bytes()
