"""The daemon that an invocation means."""

from typing import TYPE_CHECKING

from dualrestore.cli.arguments import Invocation

if TYPE_CHECKING:
    from dualrestore.transport.control_client import DaemonClient


def daemon_of(invocation: Invocation) -> "DaemonClient":
    """The daemon of `-c FILE` or else of DUALRESTORE_CONFIG."""
    from dualrestore.config import configured_path, load_configuration
    from dualrestore.transport.control_client import DaemonClient

    configuration = load_configuration(configured_path(invocation.config))
    return DaemonClient(configuration.node.control)
