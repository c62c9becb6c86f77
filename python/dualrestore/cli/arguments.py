"""Words of the command line as values: sizes, ranges, rates, and the options all verbs share.

Guarantees: a bad word is a usage error of click (exit code 2) with an example of a good one.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dualrestore.transport.nbd_uri import NbdUri

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass
class Invocation:
    """What was said before and around the verb."""

    config: str | None = None
    as_json: bool = False


class _Parsed(click.ParamType[Any]):
    """A word that a function of `sizes` reads."""

    def __init__(self, name: str, parser: str) -> None:
        self.name = name
        self._parser = parser

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        from dualrestore import sizes
        from dualrestore.errors import UsageError

        try:
            return getattr(sizes, self._parser)(value)
        except UsageError as problem:
            self.fail(str(problem), param, ctx)


SIZE = _Parsed("SIZE", "parse_size")
RANGE = _Parsed("RANGE", "parse_range")
RATE = _Parsed("RATE", "parse_rate")
DURATION = _Parsed("DURATION", "parse_duration")
COMPRESSION = _Parsed("COMPRESSION", "parse_compression")


def source_place(word: str) -> "Path | int | NbdUri":
    """A path, an export of an NBD server, or standard input for `-`."""
    from dualrestore.transport.nbd_uri import is_nbd_uri, parse_nbd_uri

    return parse_nbd_uri(word) if is_nbd_uri(word) else input_place(word)


def node_certificates(invocation: Invocation) -> Path | None:
    """The certificates of the node whose configuration is named, if one is."""
    from dualrestore.config import configured_path, load_configuration
    from dualrestore.errors import ConfigurationError, UsageError

    try:
        return load_configuration(configured_path(invocation.config)).node.tls
    except ConfigurationError:
        raise
    except UsageError:
        return None


def input_place(word: str) -> Path | int:
    """A path, or standard input for `-`."""
    from dualrestore.errors import UsageError

    if word != "-":
        return Path(word)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            "expected a tar on standard input, found a terminal: `cat FILE.tar | dualrestore ..`"
        )
    return sys.stdin.fileno()


def _remember_config(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.ensure_object(Invocation).config = value


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(Invocation).as_json = True


def config_option(function: Function) -> Function:
    """`-c FILE`, before the verb or after it."""
    return click.option(
        "-c",
        "--config",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        expose_value=False,
        callback=_remember_config,
        help="Configuration of the daemon; else DUALRESTORE_CONFIG.",
    )(function)


def json_option(function: Function) -> Function:
    """`--json`: one document on standard output, errors as one on standard error."""
    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=_remember_json,
        help="Print one JSON document for machines.",
    )(function)
