"""The command line: raw words -> options -> one action -> one printer.

Guarantees: `dualrestore --version` loads click and nothing else; every error ends in one message
and one exit code (`errors.ExitCode`); a traceback only with DUALRESTORE_DEBUG=1.
Does not know: how anything is done.
"""

import errno
import os
import signal
import sys
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from dualrestore import __version__
from dualrestore.cli.arguments import Invocation, config_option

_VERBS = {
    "demo": "The whole method on this machine in one command, verified.",
    "serve": "Run the daemon.",
    "init": "Write a commented starter configuration.",
    "status": "Volumes, maps, channels; --watch draws them live.",
    "restore": "Declare a loss: new generation, open for business at once.",
    "snapshot": "Cut a snapshot at the backup; list or delete snapshots.",
    "bundle": "Create, verify, show or extract a bundle.",
    "merge": "Merge bundles into a live volume, or into a file with a map.",
    "attach": "Read missing blocks from a plugged-in bundle, before it is merged.",
    "detach": "Stop reading from a bundle, so that it may be unplugged.",
    "map": "Create, mark, show, export or draw an overwrite map.",
    "verify": "Compare digests of both sides.",
    "completion": "Print the completion script of a shell.",
}


class Terminated(BaseException):
    """SIGTERM came."""


class _Verbs(click.Group):
    """Loads a verb when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's name
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return super().get_command(ctx, cmd_name)
        module = import_module(f"dualrestore.cli.commands.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's name
        formatter: click.HelpFormatter,
    ) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(_VERBS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as problem:
            from dualrestore.errors import DualRestoreError

            # click ends without a word where a pipe was closed; ours says which, and why.
            if problem.errno == errno.EPIPE and isinstance(problem, DualRestoreError):
                raise DualRestoreError(str(problem)) from problem
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as problem:
            from difflib import get_close_matches

            nearest = get_close_matches(args[0], _VERBS, n=1)
            if not nearest:
                raise
            text = f"{problem.message} Did you mean {nearest[0]!r}?"
            raise click.UsageError(text, ctx) from problem


@click.group(
    cls=_Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 done with damaged chunks, 4 differences, "
    "5 wrong volume, generation or format, or damaged, 6 next medium needed, 7 link down, 11 busy, "
    "130 and 143 interrupted.",
)
@click.version_option(__version__, prog_name="dualrestore", message="%(prog)s %(version)s")
@config_option
def command_line() -> None:
    """Dual-channel restoration of a volume: live over a thin link, bulk from a shipped medium.

    \b
    Example:
      dualrestore demo
    """


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - its shape
    raise Terminated


def _complain(problem: BaseException, *, as_json: bool) -> int:
    from dualrestore.cli.printer import Printer
    from dualrestore.config import debugging
    from dualrestore.errors import DualRestoreError, ExitCode, exit_code_of

    if debugging():
        import traceback

        traceback.print_exception(problem)
    code = exit_code_of(problem)
    if isinstance(problem, DualRestoreError):
        text = str(problem)
    elif isinstance(problem, OSError):
        text = f"{problem.filename or 'system'}: {problem.strerror or problem}"
    elif isinstance(problem, KeyboardInterrupt):
        text = "interrupted; ask again to go on"
    elif isinstance(problem, Terminated):
        code, text = ExitCode.TERMINATED, "terminated; ask again to go on"
    else:
        text = (
            f"unexpected {type(problem).__name__}: {problem}; "
            "run with DUALRESTORE_DEBUG=1 for the traceback, and please report it"
        )
    Printer(as_json=as_json).error(type(problem).__name__, text, code)
    return code


def run(arguments: list[str]) -> int:
    """Does what the words say; returns the exit code."""
    as_json = "--json" in arguments
    try:
        result: Any = command_line.main(
            arguments, prog_name="dualrestore", standalone_mode=False, obj=Invocation()
        )
    except click.UsageError as problem:
        if as_json:
            from dualrestore.cli.printer import Printer

            Printer(as_json=True).error("UsageError", problem.format_message(), 2)
        else:
            problem.show()
        return 2
    except click.ClickException as problem:
        problem.show()
        return 1
    except (click.Abort, KeyboardInterrupt):
        return _complain(KeyboardInterrupt(), as_json=as_json)
    except BrokenPipeError:
        # The reader of our output went away: nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Terminated, Exception) as problem:
        return _complain(problem, as_json=as_json)
    return result if isinstance(result, int) else 0


def main() -> None:
    """The entry point of the console script."""
    signal.signal(signal.SIGTERM, _on_terminate)
    sys.exit(run(sys.argv[1:]))
