"""`dualrestore init`: write a commented starter configuration."""

from pathlib import Path

import click

from dualrestore.cli.arguments import Invocation, json_option

_NODE = """\
# Configuration of `dualrestore serve`. Unknown keys are errors.
# Sizes take KiB, MiB, GiB, TiB.

[node]
state   = "/var/lib/dualrestore"              # maps, snapshots, preserved blocks; one daemon each
control = "/run/dualrestore/control.sock"     # HTTP API, status page and metrics, mode 0600
"""

_LISTEN = """\
listen  = "0.0.0.0:10810"                     # where primaries connect
"""

_TLS = """\
# ca-cert.pem, server-cert.pem, server-key.pem, client-cert.pem, client-key.pem (keys mode 0600);
# needed for every address that is not loopback.
tls     = "/etc/dualrestore/pki"
"""

_PRIMARY = """
[volume.db]
role       = "primary"
device     = "/dev/sdb"                       # device or file
# size     = "10GiB"                          # with it, a file that is missing is created sparse
block_size = "4KiB"                           # unit of tracking, a power of two, 512 to 1MiB
backups    = ["backup.example:10810/db"]      # HOST:PORT/NAME, one or more
export     = ["unix:/run/dualrestore/db.sock", "tcp:127.0.0.1:10809"]   # NBD, export name: db
mirror     = "flush"                          # a flush waits for the backup; or "write", "async"
# async_bytes   = "64MiB"                     # with "async": writes wait before the backup lags
# async_seconds = 5                           # further than this
missing_deadline = "30s"                      # reads of missing blocks fail after this, link down
direct     = false                            # true: O_DIRECT, around the page cache

# At its first start a primary waits for your word:
#   dualrestore restore db --lost none        this disk is the truth, the backup is filled from it
#   dualrestore restore db --lost all         the backup is the truth, this disk is empty
"""

_BACKUP = """
[volume.db]
role       = "backup"
device     = "/dev/sdb"                       # the mirror: device or file, of the primary's size
# size     = "10GiB"                          # with it, a file that is missing is created sparse
block_size = "4KiB"                           # the primary's
export     = ["unix:/run/dualrestore/db.sock"]   # NBD, each snapshot read-only as db@SNAPSHOT
"""


def starter(role: str) -> str:
    """The text for a node that holds a volume of that role."""
    if role == "primary":
        return _NODE + _TLS + _PRIMARY
    return _NODE + _LISTEN + _TLS + _BACKUP


@click.command("init")
@click.argument("file", default="dualrestore.toml", metavar="[FILE]")
@click.option("--role", type=click.Choice(["primary", "backup"]), default="primary")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
@click.pass_obj
def command(invocation: Invocation, file: str, role: str, force: bool) -> None:
    """Write a commented starter configuration to FILE (`-` is standard output).

    \b
    Example:
      dualrestore init --role backup /etc/dualrestore.toml
    """
    from dualrestore.cli.printer import Printer
    from dualrestore.errors import UsageError

    printer = Printer(as_json=invocation.as_json)
    text = starter(role)
    if file == "-":
        printer.text(text)
        return
    path = Path(file)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as problem:
        raise UsageError(
            f"{path}: expected a new file, found one; --force replaces it"
        ) from problem
    printer.report(
        {"file": str(path), "role": role},
        [f"wrote {path}; edit it, then run: dualrestore serve -c {path}"],
    )
