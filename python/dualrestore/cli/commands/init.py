"""`dualrestore init`: write a commented starter configuration, or a systemd unit for one."""

import sys
from pathlib import Path

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option

_NODE = """\
# Configuration of `dualrestore serve`. Unknown keys are errors.
# Sizes take KiB, MiB, GiB, TiB.

[node]
state   = "/var/lib/dualrestore"              # maps, snapshots, preserved blocks; one daemon each
control = "/run/dualrestore/control.sock"     # HTTP API, status page and metrics, mode 0600
# user  = "dualrestore"                       # started by root it goes on as this user
# media = ["/media", "/mnt"]                  # with it, writes there and at its own places only
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
@click.argument("file", required=False, metavar="[FILE]")
@click.option("--role", type=click.Choice(["primary", "backup"]), default="primary")
@click.option("--systemd", is_flag=True, help="Print a hardened unit for the configuration of -c.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@config_option
@json_option
@click.pass_obj
def command(
    invocation: Invocation, file: str | None, role: str, systemd: bool, force: bool
) -> None:
    """Write a commented starter configuration to FILE (`-` is standard output), or the systemd
    unit of a configuration.

    \b
    Example:
      dualrestore init --role backup /etc/dualrestore.toml
      dualrestore init --systemd -c /etc/dualrestore.toml /etc/systemd/system/dualrestore.service
    """
    from dualrestore.cli.printer import Printer

    printer = Printer(as_json=invocation.as_json)
    if systemd:
        configuration, text = _unit(invocation)
        if file is None or file == "-":
            printer.text(text)
            return
        _write(Path(file), text, force=force)
        printer.report(
            {"file": file, "configuration": str(configuration)},
            [f"wrote {file}; its first lines say how to install it"],
        )
        return
    if file == "-":
        printer.text(starter(role))
        return
    path = Path(file or "dualrestore.toml")
    _write(path, starter(role), force=force)
    printer.report(
        {"file": str(path), "role": role},
        [f"wrote {path}; edit it, then run: dualrestore serve -c {path}"],
    )


def _unit(invocation: Invocation) -> tuple[Path, str]:
    from dualrestore.cli.unit import unit
    from dualrestore.config import configured_path, load_configuration

    path = configured_path(invocation.config).absolute()
    program = Path(sys.executable).parent / "dualrestore"
    return path, unit(load_configuration(path), path, program)


def _write(path: Path, text: str, *, force: bool) -> None:
    from dualrestore.errors import DeviceError, UsageError

    try:
        with path.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError as problem:
        raise UsageError(
            f"{path}: expected a new file, found one; --force replaces it"
        ) from problem
    except OSError as problem:
        raise DeviceError(
            problem.errno or 5, f"{path}: cannot be written: {problem.strerror}"
        ) from problem
