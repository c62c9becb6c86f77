"""Who may open an encrypted bundle: recipients, passphrases and identities, in the formats of age.

| given | file is | wraps the key for | opens with |
|---|---|---|---|
| recipient | `age1..`, `ssh-ed25519 ..`, `ssh-rsa ..`, or a file of them | its identity | |
| identity | `AGE-SECRET-KEY-1..` lines, or an SSH private key | | what was wrapped for it |
| passphrase | one line | whoever knows it | the passphrase |

Guarantees: files that hold secrets and can be read by others are refused; no error repeats a
secret. What Python held of a secret is left to its garbage collector: immutable strings cannot be
wiped. The process writes no core dump meanwhile (`core.guard_secrets`), and bundle keys stay in the
core. Does not know: bundles.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from dualrestore.errors import FormatError, LockedError, UsageError

SECRET_BYTES_MAX = 64 * 1024
"""Longer files are no identities and hold no passphrase."""
PASSPHRASE_BYTES_MAX = 1024
RECIPIENT_FILE_BYTES_MAX = 1024 * 1024
WRAPPED_BYTES_MAX = 1024 * 1024
"""An age file of some thousand recipients."""

_PLUGIN_WORDS = (
    "recipients of age plugins are not supported; name an age1.. or SSH recipient, and wrap "
    "key.age for the plugin with age itself"
)


def _pyrage() -> Any:
    import pyrage

    return pyrage


def _read_secret(path: Path, what: str, limit: int) -> bytes:
    """The bytes of a file that nobody else may read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{path}: expected a file with {what}, found a directory")
        mode = stat.S_IMODE(found.st_mode)
        if stat.S_ISREG(found.st_mode) and mode & 0o077:
            raise UsageError(
                f"{path}: expected {what} that only its owner may read (0600), found {mode:04o}; "
                f"run: chmod 600 {path}"
            )
        held = file.read(limit + 1)
    if len(held) > limit:
        raise UsageError(
            f"{path}: expected {what} of at most {limit} bytes, found more: is it the right file?"
        )
    return held


def read_passphrase(path: str | PathLike[str]) -> str:
    """The passphrase in a file: all of it but one newline at its end."""
    held = _read_secret(Path(path), "a passphrase", PASSPHRASE_BYTES_MAX)
    for newline in (b"\r\n", b"\n"):
        if held.endswith(newline):
            held = held[: -len(newline)]
            break
    try:
        text = held.decode()
    except UnicodeDecodeError:
        raise UsageError(
            f"{path}: expected a passphrase in UTF-8, found other bytes; write it as text"
        ) from None
    return _checked_passphrase(text, f"{path}: ")


def _checked_passphrase(text: str, place: str = "") -> str:
    if not text:
        raise UsageError(f"{place}expected a passphrase, found nothing; write one into the file")
    if "\n" in text or "\0" in text:
        raise UsageError(
            f"{place}expected a passphrase of one line, found several; keep the first only"
        )
    return text


def _recipient(text: str, place: str = "") -> Any:
    pyrage = _pyrage()
    kinds: list[Any] = []
    if text.startswith("ssh-"):
        kinds = [pyrage.ssh]
    elif text.startswith("age1"):
        kinds = [pyrage.x25519, pyrage.tag, pyrage.tagpq]
    for kind in kinds:
        try:
            return kind.Recipient.from_str(text)
        except pyrage.RecipientError:
            continue
    if text.startswith("AGE-SECRET-KEY-"):
        raise UsageError(
            f"{place}expected a recipient (age1..), found an identity: it is secret, and whoever "
            "saw it can open what it opens; age-keygen -y shows its recipient"
        )
    shown = text if len(text) <= 100 else text[:97] + "..."
    words = f"; {_PLUGIN_WORDS}" if text.startswith("age1") and text.count("1") > 1 else ""
    raise UsageError(
        f"{place}expected a recipient (age1.., ssh-ed25519 .., ssh-rsa ..) or a file of them, "
        f"found {shown!r}{words}"
    )


def _recipients_of(text: str) -> list[Any]:
    """The recipient that is named, or all those in the file that is."""
    if text.startswith(("age1", "ssh-", "AGE-SECRET-KEY-")):
        return [_recipient(text)]
    path = Path(text)
    if not path.is_file():
        return [_recipient(text)]
    with path.open("rb") as file:
        held = file.read(RECIPIENT_FILE_BYTES_MAX + 1)
    if len(held) > RECIPIENT_FILE_BYTES_MAX:
        raise UsageError(f"{path}: expected a file of recipients, found more than 1 MiB")
    lines = held.decode(errors="replace").splitlines()
    named = [
        (number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not named:
        raise UsageError(f"{path}: expected recipients, one a line, found none")
    return [_recipient(line, f"{path}, line {number}: ") for number, line in named]


@dataclass(frozen=True)
class Lock:
    """Who may open a bundle that is being made. Shows no secret."""

    recipients: tuple[Any, ...] = ()
    passphrase: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, recipients: Sequence[str] = (), passphrase: str | None = None) -> "Lock | None":
        """None if neither is given. Raises `UsageError` for what is no recipient."""
        if passphrase is not None:
            if recipients:
                raise UsageError(
                    "expected recipients or a passphrase, found both: age wraps a key for one or "
                    "the other; leave one out"
                )
            return cls(passphrase=_checked_passphrase(passphrase))
        if isinstance(recipients, str):
            raise UsageError("expected a list of recipients, found one text; put it into a list")
        found = tuple(one for text in recipients for one in _recipients_of(fspath(text)))
        return cls(recipients=found) if found else None

    def wrap(self, text: bytes) -> bytes:
        """An age file that holds the text."""
        pyrage = _pyrage()
        try:
            wrapped: bytes = (
                pyrage.passphrase.encrypt(text, self.passphrase)
                if self.passphrase is not None
                else pyrage.encrypt(text, list(self.recipients))
            )
        except pyrage.EncryptError as problem:
            raise UsageError(f"the recipients cannot be used together: {problem}") from None
        return wrapped


def _identities(path: Path) -> list[Any]:
    pyrage = _pyrage()
    held = _read_secret(path, "an identity", SECRET_BYTES_MAX)
    if b"-----BEGIN" in held[:4096] and b"PRIVATE KEY-----" in held[:4096]:
        try:
            return [pyrage.ssh.Identity.from_buffer(held)]
        except Exception:
            raise UsageError(
                f"{path}: expected an SSH key that opens age files (ed25519 or RSA, without a "
                "passphrase of its own), found another; decrypt a copy with ssh-keygen -p, or "
                "unwrap key.age with age itself"
            ) from None
    if held.startswith((b"age-encryption.org/", b"-----BEGIN AGE")):
        raise UsageError(
            f"{path}: expected an identity, found one that is itself encrypted; decrypt it first: "
            f"age -d {path}"
        )
    found = []
    for number, line in enumerate(held.decode(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            found.append(pyrage.x25519.Identity.from_str(text))
        except pyrage.IdentityError:
            # The line may be a secret that was broken in copying: it is not shown.
            raise UsageError(
                f"{path}, line {number}: expected an identity (AGE-SECRET-KEY-1..) or an SSH "
                "private key, found something else"
            ) from None
    if not found:
        raise UsageError(f"{path}: expected an identity (AGE-SECRET-KEY-1..), found none")
    return found


@dataclass(frozen=True)
class Opener:
    """What opens bundles. Shows no secret."""

    identities: tuple[Any, ...] = field(default=(), repr=False)
    passphrase: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, identity: str | PathLike[str] | None = None, passphrase: str | None = None
    ) -> "Opener | None":
        """`identity` is a file; None if neither is given."""
        if identity is not None and passphrase is not None:
            raise UsageError("expected an identity or a passphrase, found both; leave one out")
        if identity is not None:
            return cls(identities=tuple(_identities(Path(identity))))
        return None if passphrase is None else cls(passphrase=_checked_passphrase(passphrase))

    def unwrap(self, wrapped: bytes, place: str) -> bytes:
        """What the age file holds. Raises `LockedError` if this does not open it."""
        pyrage = _pyrage()
        if not wrapped.startswith((b"age-encryption.org/v1\n", b"-----BEGIN AGE")):
            raise FormatError(f"{place}: expected an age file, found other bytes; copy it again")
        by_passphrase = b"\n-> scrypt " in wrapped[:4096]
        try:
            opened: bytes = (
                pyrage.passphrase.decrypt(wrapped, self.passphrase)
                if self.passphrase is not None
                else pyrage.decrypt(wrapped, list(self.identities))
            )
        except (pyrage.DecryptError, ValueError):
            if self.passphrase is None:
                words = "it asks for a passphrase" if by_passphrase else "it is for others"
                found = "the identity does not open it"
            else:
                words = "wrong passphrase" if by_passphrase else "it asks for an identity"
                found = "the passphrase does not open it"
            raise LockedError(
                f"{place}: {found}: {words}, or the file is damaged; nothing was touched"
            ) from None
        return opened
