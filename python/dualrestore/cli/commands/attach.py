"""`dualrestore attach`: a plugged-in bundle serves missing blocks at once."""

from pathlib import Path
from typing import Any

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option
from dualrestore.cli.secrets import key_options


@click.command("attach")
@click.argument("words", nargs=-1, required=True, metavar="BUNDLE.. NAME")
@key_options
@config_option
@json_option
@click.pass_obj
def command(
    invocation: Invocation,
    words: tuple[str, ...],
    identity: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Read missing blocks of volume NAME from bundles too, at local speed, ahead of the link.

    Nothing is copied ahead: what is read is verified and kept, as if it had come over the link.
    Attach at once when the disk is plugged in, then merge it; both may go on side by side. A disk
    that is pulled out is left for the link. The key of an encrypted bundle is not remembered over
    a restart of the daemon: attach it again then.

    \b
    Example:
      dualrestore -c primary.toml attach /media/truck/db.drb db
      dualrestore -c primary.toml merge /media/truck/db.drb db
    """
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer
    from dualrestore.cli.secrets import opener_of, trust_documents
    from dualrestore.core import trusts_of
    from dualrestore.errors import UsageError
    from dualrestore.model import AttachReport, read
    from dualrestore.sizes import format_size

    if len(words) == 1:
        raise UsageError(f"expected BUNDLE.. and then a volume, found only {words[0]!r}")
    *bundles, name = words
    paths = [Path(bundle).absolute() for bundle in bundles]
    trusts = trusts_of(paths, opener_of(identity, passphrase_file))
    body: dict[str, Any] = {"bundles": [str(path) for path in paths]}
    if any(trusts):
        body["trusts"] = trust_documents(trusts)
    client = daemon_of(invocation)
    report = read(AttachReport, client.call("POST", f"/v1/volumes/{name}/attach", body))
    lines = [
        f"{name}: reads missing blocks from {medium.path} ({format_size(medium.bytes_covered)} of "
        "the volume)"
        for medium in report.media
    ]
    if any(trusts):
        lines.append("the key is not kept over a restart of the daemon: attach it again then")
    Printer(as_json=invocation.as_json).report(report.document(), lines)
