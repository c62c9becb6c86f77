"""Encrypted and signed bundles as a user meets them, beside stock age and ssh-keygen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dualrestore as dr
from dualrestore.keys import Lock, Opener, read_passphrase

MIB = 2**20
PASSPHRASE = "correct horse"
IDENTITY = Path(__file__).parents[1] / "golden" / "bundle-v1-encrypted" / "identity.txt"


def run(*words: str | Path, code: int = 0) -> str:
    ended = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


def dualrestore(*words: str | Path, code: int = 0) -> str:
    return run(sys.executable, "-m", "dualrestore", *words, code=code)


def secret(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(0o600)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "good.img"
    path.write_bytes(os.urandom(2 * MIB) + bytes(MIB) + b"text of the volume " * 60_000)
    os.truncate(path, 5 * MIB)
    return path


@pytest.fixture
def identity(tmp_path: Path) -> Path:
    run("age-keygen", "-o", tmp_path / "identity.txt")
    return tmp_path / "identity.txt"


@pytest.fixture
def recipient(identity: Path) -> str:
    return run("age-keygen", "-y", identity).strip()


@pytest.fixture
def signing_key(tmp_path: Path) -> Path:
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "signing")
    return tmp_path / "signing"


@pytest.fixture
def signers(tmp_path: Path, signing_key: Path) -> Path:
    path = tmp_path / "allowed_signers"
    path.write_text(f"operator@example {signing_key.with_suffix('.pub').read_text()}")
    return path


def merged(bundle: dr.Bundle, place: Path, size: int) -> bytes:
    target = place / "target.img"
    target.write_bytes(os.urandom(size))
    with dr.OverwriteMap.create(place / "over.map", size) as overwrite:
        dr.merge(bundle, target, overwrite)
    return target.read_bytes()


def test_stock_age_unwraps_the_key_and_recover_py_restores_with_it(
    tmp_path: Path, image: Path, identity: Path, recipient: str
) -> None:
    bundle = tmp_path / "drb"
    dr.Bundle.create(image, bundle, recipients=[recipient], compression="zstd:3")
    text = run("age", "-d", "-i", identity, bundle / "key.age")
    key = secret(tmp_path / "bundle.key", text)
    out = tmp_path / "out.img"
    said = run(sys.executable, "-I", bundle / "recover.py", "--key", key, bundle, out)
    assert "AES-256-GCM" in said
    assert out.read_bytes() == image.read_bytes()
    refused = run(sys.executable, "-I", bundle / "recover.py", bundle, code=1)
    assert "--key" in refused
    wrong = secret(tmp_path / "wrong.key", text[:-2] + ("0\n" if text[-2] != "0" else "1\n"))
    refused = run(sys.executable, "-I", bundle / "recover.py", "--key", wrong, bundle, code=1)
    assert "not the one of this bundle" in refused


def test_what_stock_age_wraps_opens_the_bundle(
    tmp_path: Path, image: Path, identity: Path, recipient: str
) -> None:
    made = dr.Bundle.create(image, tmp_path / "drb", recipients=[recipient])
    key = secret(tmp_path / "key", run("age", "-d", "-i", identity, tmp_path / "drb" / "key.age"))
    run("age", "-a", "-r", recipient, "-o", tmp_path / "drb" / "key.age", key)
    opened = dr.Bundle.open(made.path, identity=identity)
    assert merged(opened, tmp_path, 5 * MIB) == image.read_bytes()


def test_several_recipients_and_ssh_keys_each_open_it(
    tmp_path: Path, image: Path, identity: Path, recipient: str, signing_key: Path
) -> None:
    listed = tmp_path / "recipients.txt"
    listed.write_text(f"# who may\n\n{recipient}\n{signing_key.with_suffix('.pub').read_text()}")
    bundle = tmp_path / "drb"
    golden = run("age-keygen", "-y", IDENTITY).strip()
    dualrestore(
        "bundle", "create", image, "--to", bundle, "--recipient", listed, "--recipient", golden
    )
    golden_identity = secret(tmp_path / "golden.txt", IDENTITY.read_text())
    for one in (identity, signing_key, golden_identity):
        assert "sound" in dualrestore("bundle", "verify", bundle, "--identity", one)


def test_a_wrong_passphrase_is_refused_before_anything_is_touched(
    tmp_path: Path, image: Path
) -> None:
    right = secret(tmp_path / "right", PASSPHRASE + "\n")
    wrong = secret(tmp_path / "wrong", "battery staple")
    bundle, target, over = tmp_path / "drb", tmp_path / "target.img", tmp_path / "over.map"
    dualrestore("bundle", "create", image, "--to", bundle, "--passphrase-file", right)
    target.write_bytes(os.urandom(5 * MIB))
    dualrestore("map", "create", over, "--size", "5MiB")
    before = (target.read_bytes(), over.read_bytes())
    merge = ("merge", bundle, target, "--map", over)
    said = dualrestore(*merge, "--passphrase-file", wrong, code=5)
    assert "wrong passphrase" in said
    assert "battery" not in said
    assert "Traceback" not in said
    assert "encrypted" in dualrestore(*merge, code=5)
    assert (target.read_bytes(), over.read_bytes()) == before
    dualrestore(*merge, "--passphrase-file", right)
    assert target.read_bytes() == image.read_bytes()


def test_a_plain_bundle_is_not_taken_for_an_encrypted_one(
    tmp_path: Path, image: Path, identity: Path
) -> None:
    dr.Bundle.create(image, tmp_path / "drb")
    with pytest.raises(dr.LockedError, match="exchanged"):
        dr.Bundle.open(tmp_path / "drb", identity=identity)
    lock = Lock.of(passphrase="x")
    assert lock is not None
    (tmp_path / "drb" / "key.age").write_bytes(lock.wrap(b"no key"))
    with pytest.raises(dr.LockedError, match=r"key\.age of this bundle"):
        dr.Bundle.open(tmp_path / "drb", passphrase="x")


def test_the_key_file_of_another_bundle_opens_nothing(
    tmp_path: Path, image: Path, identity: Path, recipient: str
) -> None:
    for name in ("one", "two"):
        dr.Bundle.create(image, tmp_path / name, recipients=[recipient])
    (tmp_path / "one" / "key.age").write_bytes((tmp_path / "two" / "key.age").read_bytes())
    with pytest.raises(dr.LockedError, match="found another one"):
        dr.Bundle.open(tmp_path / "one", identity=identity).verify()


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        (PASSPHRASE, 0o644, "chmod 600"),
        (PASSPHRASE, 0o640, "chmod 600"),
        ("", 0o600, "found nothing"),
        ("\n", 0o600, "found nothing"),
        ("two\nlines\n", 0o600, "one line"),
        (b"\xff\xfe", 0o600, "UTF-8"),
        ("x" * 2000, 0o600, "at most 1024 bytes"),
    ],
)
def test_passphrase_files_that_are_refused(
    tmp_path: Path, text: str | bytes, mode: int, words: str
) -> None:
    path = secret(tmp_path / "pass", text)
    path.chmod(mode)
    with pytest.raises(dr.UsageError, match=words) as refused:
        read_passphrase(path)
    assert PASSPHRASE not in str(refused.value)


@pytest.mark.parametrize(
    ("held", "passphrase"),
    [("a b", "a b"), ("a b\n", "a b"), ("a b\r\n", "a b"), (" a \t\n", " a \t")],
)
def test_one_newline_at_its_end_is_not_part_of_a_passphrase(
    tmp_path: Path, held: str, passphrase: str
) -> None:
    assert read_passphrase(secret(tmp_path / "pass", held)) == passphrase


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("age1nonsense", "expected a recipient"),
        ("nowhere.txt", "expected a recipient"),
        ("ssh-ed25519 nonsense", "expected a recipient"),
        ("AGE-SECRET-KEY-1QQQQ", "found an identity"),
        ("age1yubikey1qwt50d05nh5vutpdzmlg5wn80xq5negm4uj9ghv0snvdd3yysf5yw3rhl3t", "plugins"),
    ],
)
def test_what_is_no_recipient_is_refused(given: str, words: str) -> None:
    with pytest.raises(dr.UsageError, match=words) as refused:
        Lock.of([given])
    assert "QQQQ" not in str(refused.value)


def test_recipients_and_a_passphrase_exclude_each_other(recipient: str) -> None:
    with pytest.raises(dr.UsageError, match="found both"):
        Lock.of([recipient], PASSPHRASE)


def test_identities_that_are_refused(tmp_path: Path, identity: Path) -> None:
    held = identity.read_text()
    identity.chmod(0o644)
    with pytest.raises(dr.UsageError, match="chmod 600"):
        Opener.of(identity)
    for text, words in (
        ("", "found none"),
        (held.replace("KEY-1", "KEY-2"), "line 3"),
        ("age-encryption.org/v1\n-> scrypt", "itself encrypted"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nxxxx\n", "without a passphrase"),
    ):
        with pytest.raises(dr.UsageError, match=words) as refused:
            Opener.of(secret(tmp_path / "bad", text))
        assert "AGE-SECRET-KEY-2" not in str(refused.value)


def test_no_object_shows_a_secret(tmp_path: Path, image: Path) -> None:
    lock, opener = Lock.of(passphrase=PASSPHRASE), Opener.of(passphrase=PASSPHRASE)
    bundle = dr.Bundle.create(image, tmp_path / "drb", passphrase=PASSPHRASE)
    assert bundle.trust is not None
    assert bundle.trust.key is not None
    digits = bundle.trust.key.text().decode().split()[2]
    shown = f"{lock!r} {opener!r} {bundle!r} {bundle.trust!r} {bundle.trust.key!r} {bundle.show()}"
    assert PASSPHRASE not in shown
    assert digits not in shown


def test_a_process_that_holds_a_key_writes_no_core_dump(tmp_path: Path, image: Path) -> None:
    script = (
        "import resource, sys, dualrestore as dr\n"
        f"dr.Bundle.create({str(image)!r}, {str(tmp_path / 'drb')!r}, passphrase='secret')\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0])\n"
        "import os; print(os.stat('/proc/self/mem').st_uid, os.access('/proc/self/mem', os.R_OK))\n"
        "import ctypes; print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))\n"
    )
    limit, *_, dumpable = run(sys.executable, "-c", script).split()
    assert (limit, dumpable) == ("0", "0")


def test_a_signed_bundle_is_taken_from_its_signers_only(
    tmp_path: Path, image: Path, signing_key: Path, signers: Path
) -> None:
    bundle = tmp_path / "drb"
    dualrestore("bundle", "create", image, "--to", bundle, "--sign", signing_key)
    run(
        "sh", "-c",
        f"ssh-keygen -Y verify -f {signers} -I operator@example -n dualrestore-bundle "
        f"-s {bundle}/manifest.json.sig < {bundle}/manifest.json",
    )  # fmt: skip
    assert "sound" in dualrestore("bundle", "verify", bundle, "--signers", signers)
    opened = dr.Bundle.open(bundle, signers=signers)
    assert merged(opened, tmp_path, 5 * MIB) == image.read_bytes()
    others = tmp_path / "others"
    others.write_text(signers.read_text().replace("AAAAI", "AAAAJ"))
    assert "ssh-keygen" in dualrestore("bundle", "verify", bundle, "--signers", others, code=5)
    (bundle / "manifest.json.sig").unlink()
    said = dualrestore("bundle", "verify", bundle, "--signers", signers, code=5)
    assert "no signature" in said


def test_a_signature_for_something_else_signs_no_bundle(
    tmp_path: Path, image: Path, signing_key: Path, signers: Path
) -> None:
    bundle = tmp_path / "drb"
    dr.Bundle.create(image, bundle)
    run("ssh-keygen", "-Y", "sign", "-f", signing_key, "-n", "git", bundle / "manifest.json")
    with pytest.raises(dr.SignatureError, match="not for bundles"):
        dr.Bundle.open(bundle, signers=signers)


def test_what_cannot_sign_is_refused_before_a_bundle_is_made(tmp_path: Path, image: Path) -> None:
    for key in (tmp_path / "nowhere", secret(tmp_path / "nonsense", "no key")):
        with pytest.raises(dr.UsageError, match="SSH key to sign with"):
            dr.Bundle.create(image, tmp_path / "drb", sign=key)
    assert not (tmp_path / "drb").exists()


@pytest.mark.parametrize("word", ["gzip", "zstd:0", "zstd:23", "auto:1", "zstd:"])
def test_unknown_compression_is_refused(tmp_path: Path, image: Path, word: str) -> None:
    said = dualrestore(
        "bundle", "create", image, "--to", tmp_path / "drb", "--compress", word, code=2
    )
    assert "zstd:22" in said


@pytest.mark.parametrize("word", ["auto", "zstd", "zstd:9"])
def test_compression_is_counted(tmp_path: Path, image: Path, word: str) -> None:
    report = dr.Bundle.create(image, tmp_path / "drb", compression=word).report
    assert report is not None
    assert report.bytes_saved > MIB // 2
    assert report.chunks_compressed >= 1
    assert report.bytes_saved == report.bytes_data - report.bytes_stored
