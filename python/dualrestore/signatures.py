"""Signatures of manifests, made and checked by the stock `ssh-keygen`.

`manifest.json.sig` beside `manifest.json` is an SSH signature of that file in the namespace
`dualrestore-bundle`. The manifest vouches for every byte of the bundle (docs/formats.md), so the
signature does.

Guarantees: what is verified are bytes in memory, the very ones that are then believed; keys are
named by their files only. Does not know: what a manifest says.
"""

import hashlib
import os
import subprocess
import tempfile
from os import PathLike
from pathlib import Path

from dualrestore.errors import DualRestoreError, FormatError, SignatureError, UsageError

NAMESPACE = "dualrestore-bundle"
SIGNATURE_NAME = "manifest.json.sig"
SIGNATURE_BYTES_MAX = 64 * 1024
PROGRAM = "ssh-keygen"
MANIFEST_NAME = "manifest.json"
MANIFEST_BYTES_MAX = 128 * 2**20
AnyPath = str | PathLike[str]
Place = AnyPath | int
"""Of a bundle: a path, or a descriptor that one goes through as a tar."""


def _run(arguments: list[str], held: bytes) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            [PROGRAM, "-Y", *arguments], input=held, capture_output=True, check=False
        )
    except FileNotFoundError:
        raise DualRestoreError(
            f"signatures need the program {PROGRAM}, and it is not there; install openssh-client"
        ) from None


def _said(done: "subprocess.CompletedProcess[bytes]") -> str:
    text = (done.stderr or done.stdout).decode(errors="replace").strip()
    return " ".join(text.splitlines()[-2:]) or f"it ended with {done.returncode}"


def check_signing_key(key: Path) -> None:
    """Refuses, before any work, a key that cannot be used."""
    if not key.is_file():
        raise UsageError(f"{key}: expected an SSH key to sign with, found nothing")
    sign(b"", key)


def sign(manifest: bytes, key: Path) -> bytes:
    """The signature of a manifest. A key with a passphrase comes from the SSH agent."""
    done = _run(["sign", "-q", "-f", str(key), "-n", NAMESPACE], manifest)
    if done.returncode or b"BEGIN SSH SIGNATURE" not in done.stdout:
        raise UsageError(f"{key}: expected an SSH key to sign with; {PROGRAM} says: {_said(done)}")
    return done.stdout


def verify(manifest: bytes, signature: bytes, signers: Path) -> str:
    """Who signed the manifest, of those whom the file of allowed signers lists."""
    if not signers.is_file():
        raise UsageError(f"{signers}: expected a file of allowed signers, found nothing")
    # ssh-keygen takes the signature from a file only.
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, SIGNATURE_NAME)
        path.write_bytes(signature)
        found = _run(["find-principals", "-s", str(path), "-f", str(signers)], b"")
        if found.returncode:
            raise SignatureError(
                f"expected a signature by one of {signers}, found another; "
                f"{PROGRAM} says: {_said(found)}"
            )
        last = found
        for principal in dict.fromkeys(found.stdout.decode(errors="replace").splitlines()):
            words = ["verify", "-q", "-f", str(signers), "-I", principal, "-n", NAMESPACE]
            last = _run([*words, "-s", str(path)], manifest)
            if last.returncode == 0:
                return principal
    raise SignatureError(
        "the manifest is not what was signed, or not for bundles: do not use it, and ask who had "
        f"the medium; {PROGRAM} says: {_said(last)}"
    )


def read_signature(directory: Path) -> bytes:
    """The signature beside a manifest."""
    path = directory / SIGNATURE_NAME
    try:
        with path.open("rb") as file:
            held = file.read(SIGNATURE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise SignatureError(
            f"{path}: expected a signed bundle, found no signature; it may have been exchanged"
        ) from None
    if len(held) > SIGNATURE_BYTES_MAX:
        raise SignatureError(f"{path}: expected a signature of at most 64 KiB, found more")
    return held


def write_signature(directory: Path, signature: bytes) -> None:
    """Beside the manifest, durable, whole or not at all."""
    path = directory / SIGNATURE_NAME
    unfinished = directory / (SIGNATURE_NAME + ".new")
    with unfinished.open("wb") as file:
        file.write(signature)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_member(directory: Path, name: str, limit: int) -> bytes:
    """A small member of a bundle's directory, whole."""
    path = directory / name
    with path.open("rb") as file:
        held = file.read(limit + 1)
    if len(held) > limit:
        raise FormatError(f"{path}: expected at most {limit} bytes, found more: copy it again")
    return held


def signed_manifest(bundle: Place, signers: AnyPath) -> bytes:
    """The SHA-256 of a manifest that one of the signers signed."""
    if isinstance(bundle, int) or (Path(bundle).exists() and not Path(bundle).is_dir()):
        raise SignatureError(
            f"{bundle}: expected a directory, which alone carries a signature, found a tar or an "
            "image: unpack a tar with `tar xf`, or name no signers"
        )
    directory = Path(bundle)
    signature = read_signature(directory)
    manifest = read_member(directory, MANIFEST_NAME, MANIFEST_BYTES_MAX)
    verify(manifest, signature, Path(signers))
    return hashlib.sha256(manifest).digest()


def check_signable(destination: Place, key: AnyPath) -> None:
    """Raises `UsageError` if what is made there cannot be signed with that SSH key."""
    check_signing_key(Path(key))
    if not isinstance(destination, int):
        path = Path(destination)
        if path.is_dir() or (not path.exists() and path.suffix != ".tar"):
            return
    raise UsageError(
        "expected a new directory as the place of a signed bundle, found a tar: sign in a "
        "directory, and make a tar of that"
    )


def sign_bundle(bundle: AnyPath, key: AnyPath) -> None:
    """Writes `manifest.json.sig` with an SSH key."""
    directory = Path(bundle)
    manifest = read_member(directory, MANIFEST_NAME, MANIFEST_BYTES_MAX)
    write_signature(directory, sign(manifest, Path(key)))


def sign_finished(medium: AnyPath, key: AnyPath) -> None:
    """Signs a medium that is finished and not signed yet."""
    place = Path(medium)
    if (place / MANIFEST_NAME).exists() and not (place / SIGNATURE_NAME).exists():
        sign_bundle(medium, key)
