"""Options that name secrets and signatures, always as files: no secret stands in an argument.

Guarantees: the process writes no core dump from before the first secret is read.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dualrestore.core import Encryption, Trust
    from dualrestore.keys import Opener

Function = TypeVar("Function", bound=Callable[..., Any])
FILE: click.ParamType[Any] = click.Path(path_type=Path)


def opening_options(function: Function) -> Function:
    """`--identity`, `--passphrase-file` and `--signers` of a verb that reads bundles."""
    signers = click.option(
        "--signers",
        type=FILE,
        metavar="FILE",
        help="Allowed signers, as ssh-keygen takes them; an unsigned bundle is refused.",
    )
    return key_options(signers(function))


def key_options(function: Function) -> Function:
    """`--identity` and `--passphrase-file`."""
    for option in (
        click.option(
            "--passphrase-file",
            type=FILE,
            metavar="FILE",
            help="Passphrase of the encrypted bundle; readable by its owner only.",
        ),
        click.option(
            "--identity",
            type=FILE,
            metavar="FILE",
            help="Identity of age, or an SSH key, that opens the encrypted bundle.",
        ),
    ):
        function = option(function)
    return function


def locking_options(function: Function) -> Function:
    """`--recipient`, `--passphrase-file`, `--plain` and `--sign` of a verb that makes bundles."""
    for option in (
        click.option("--sign", type=FILE, metavar="KEY", help="SSH key to sign the manifest with."),
        click.option("--plain", is_flag=True, help="Not encrypted, also on a removable disk."),
        click.option(
            "--passphrase-file",
            type=FILE,
            metavar="FILE",
            help="Encrypt under the passphrase in this file; readable by its owner only.",
        ),
        click.option(
            "--recipient",
            "recipients",
            multiple=True,
            metavar="age1..|ssh-..|FILE",
            help="Encrypt for this recipient of age, or those in a file; may be repeated.",
        ),
    ):
        function = option(function)
    return function


def opener_of(identity: Path | None, passphrase_file: Path | None) -> "Opener | None":
    """What opens bundles; None if neither is named."""
    if identity is None and passphrase_file is None:
        return None
    from dualrestore.core import guard_secrets
    from dualrestore.keys import Opener, read_passphrase

    guard_secrets()
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    return Opener.of(identity, passphrase)


def encryption_of(
    recipients: tuple[str, ...], passphrase_file: Path | None, *, plain: bool
) -> "Encryption | None":
    """The key of a new bundle, wrapped; None if it is not to be encrypted."""
    from dualrestore.errors import UsageError

    if not recipients and passphrase_file is None:
        return None
    if plain:
        raise UsageError("expected --plain or a recipient or passphrase, found both; leave one out")
    from dualrestore.core import guard_secrets, locked_with
    from dualrestore.keys import Lock, read_passphrase

    guard_secrets()
    passphrase = None if passphrase_file is None else read_passphrase(passphrase_file)
    lock = Lock.of(recipients, passphrase)
    return None if lock is None else locked_with(lock)


def encryption_document(encryption: "Encryption | None") -> dict[str, str] | None:
    """For the daemon, over its Unix socket."""
    if encryption is None:
        return None
    import base64

    key, wrapped_key = encryption
    return {
        "key": key.text().decode(),
        "wrapped_key": base64.b64encode(wrapped_key).decode(),
    }


def trust_documents(trusts: "Sequence[Trust | None]") -> "list[dict[str, Any] | None]":
    """The same of what bundles are held to. The key of a stream is asked for when it has come."""
    return [
        None
        if trust is None
        else {"ask": True}
        if trust.key is None and trust.manifest is None
        else {
            "key": None if trust.key is None else trust.key.text().decode(),
            "manifest": None if trust.manifest is None else trust.manifest.hex(),
        }
        for trust in trusts
    ]


def check_sign(key: Path | None, destination: Path | int) -> None:
    """Refuses a key that cannot sign what is made there before anything is made."""
    if key is not None:
        from dualrestore.signatures import check_signable

        check_signable(destination, key)
