"""`dualrestore completion`: the completion script of a shell."""

import click

from dualrestore.cli.arguments import Invocation, json_option


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@json_option
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    Example:
      dualrestore completion bash > /etc/bash_completion.d/dualrestore
    """
    from click.shell_completion import get_completion_class

    from dualrestore.cli.printer import Printer

    kind = get_completion_class(shell)
    assert kind is not None, "click knows the shells that we offer"
    root = ctx.find_root().command
    script = kind(root, {}, "dualrestore", "_DUALRESTORE_COMPLETE").source()
    invocation = ctx.ensure_object(Invocation)
    printer = Printer(as_json=invocation.as_json)
    if invocation.as_json:
        printer.report({"shell": shell, "script": script}, [])
    else:
        printer.text(script)
