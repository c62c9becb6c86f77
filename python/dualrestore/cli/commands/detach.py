"""`dualrestore detach`: a bundle that may be unplugged."""

from pathlib import Path

import click

from dualrestore.cli.arguments import Invocation, config_option, json_option


@click.command("detach")
@click.argument("bundle")
@click.argument("name")
@config_option
@json_option
@click.pass_obj
def command(invocation: Invocation, bundle: str, name: str) -> None:
    """Stop reading missing blocks of volume NAME from BUNDLE, which may be unplugged then.

    What was read from it stays. Nothing is lost: what is still missing comes over the link.

    \b
    Example:
      dualrestore -c primary.toml detach /media/truck/db.drb db
    """
    from dualrestore.cli.daemon import daemon_of
    from dualrestore.cli.printer import Printer
    from dualrestore.model import AttachReport, read

    path = str(Path(bundle).absolute())
    client = daemon_of(invocation)
    report = read(AttachReport, client.call("POST", f"/v1/volumes/{name}/detach", {"bundle": path}))
    Printer(as_json=invocation.as_json).report(
        report.document(), [f"{name}: {path} is detached; it may be unplugged"]
    )
