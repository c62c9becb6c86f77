"""Tells systemd how we are, by its own small protocol: a datagram to the socket it named.

Guarantees: without such a socket, or when it does not answer, nothing happens.
"""

import contextlib
import socket

from dualrestore.config import notify_socket


def notify(**state: str) -> None:
    """For example `notify(READY="1", STATUS="serving 2 volumes")`."""
    path = notify_socket()
    if path is None:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    message = "\n".join(f"{key}={value}" for key, value in state.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(path)
        sender.sendall(message.encode())
