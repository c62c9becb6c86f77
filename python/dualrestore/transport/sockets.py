"""Socket options and Unix listeners.

Guarantees: a dead peer of a link is noticed within `SILENCE_MS`, even when the cable was cut and
nothing says so; a Unix socket in use by another process is never taken over; what listens for its
owner hears nobody else, whatever the mode of its file has become.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Any

from dualrestore.config import Address
from dualrestore.errors import BusyError, DeviceError

SILENCE_MS = 10_000
"""Unacknowledged bytes older than this end a link connection (TCP_USER_TIMEOUT)."""
UNSENT_BYTES = 128 * 1024
"""What the kernel may hold that is not yet on the wire: more would delay what comes later."""
BACKLOG = 128

log = logging.getLogger("dualrestore")

ROOT = 0
_PEER = struct.Struct("=iII")
"""`struct ucred`: process, user, group."""


class OwnerSocket(socket.socket):
    """A Unix listener for processes of our own user and of root."""

    def accept(self) -> tuple[socket.socket, Any]:
        """As a listener's; who is somebody else is turned away (ConnectionAbortedError)."""
        client, place = super().accept()
        told = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        process, user, _ = _PEER.unpack(told)
        if user in {ROOT, os.geteuid()}:
            return client, place
        client.close()
        log.warning(
            "%s: process %d of user %d was turned away: only user %d and root are heard",
            self.getsockname(), process, user, os.geteuid(),
        )  # fmt: skip
        raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))


def prepare_link_socket(link: socket.socket) -> None:
    """Small frames at once, dead peers noticed, no deep queue in the kernel."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_MS)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def check_unix_free(path: Path) -> None:
    """Refuses a path at which somebody listens, or another kind of file is."""
    try:
        found = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise BusyError(
            f"{path}: expected a free path for a socket, found another file there; "
            "choose another path"
        )
    if _is_answered(path):
        raise BusyError(
            f"{path}: expected a free path for a socket, found it in use by another process; "
            "stop it or choose another path"
        )


def check_tcp_free(address: Address) -> None:
    """Refuses an address at which somebody listens, or that is none of this machine."""
    for listener in listen_tcp_everywhere(address):
        listener.close()


def listen_unix(path: Path, mode: int, kind: type[socket.socket] = socket.socket) -> socket.socket:
    """A listener at `path` with these permissions. A socket that nobody answers is replaced."""
    check_unix_free(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    listener = kind(socket.AF_UNIX)
    # The permissions must hold from the first moment, not from a chmod after the bind.
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    except OSError as problem:
        listener.close()
        raise DeviceError(
            problem.errno or 5, f"{path}: cannot listen: {problem.strerror}"
        ) from problem
    finally:
        os.umask(before)
    listener.listen(BACKLOG)
    return listener


def listen_tcp(address: Address) -> socket.socket:
    """A listener at a TCP address, the first that its name leads to."""
    (first, *rest) = _listen(address, first_only=True)
    assert not rest
    return first


def listen_tcp_everywhere(address: Address) -> list[socket.socket]:
    """Listeners at all addresses that its name leads to, IPv4 and IPv6; all or none."""
    return _listen(address, first_only=False)


def _listen(address: Address, *, first_only: bool) -> list[socket.socket]:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as problem:
        raise DeviceError(
            problem.errno or 5, f"{address}: cannot listen: {problem.strerror}"
        ) from problem
    places = list(dict.fromkeys((family, place) for family, _, _, _, place in found))
    listeners: list[socket.socket] = []
    try:
        for family, place in places[:1] if first_only else places:
            # Two families side by side need sockets of one family each.
            listeners.append(_listener(family, place, alone=len(places) == 1))
    except OSError as problem:
        for listener in listeners:
            listener.close()
        if problem.errno == errno.EADDRINUSE:
            raise BusyError(
                f"{address}: expected a free address, found it in use by another process; "
                "stop it or choose another port"
            ) from problem
        text = f"{address}: cannot listen: {problem.strerror}"
        raise DeviceError(problem.errno or 5, text) from problem
    return listeners


def _listener(family: int, place: Any, *, alone: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and not alone:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def remove_socket(path: Path) -> None:
    """Removes the path of a listener that we closed, unless its directory is no longer ours: who
    listens there next replaces it."""
    with contextlib.suppress(FileNotFoundError, PermissionError):
        path.unlink()
