"""What the daemon's process gives up, and when.

| when | what | if |
|---|---|---|
| before the first thread | running programs, mounting, tracing, new privileges (seccomp) | always |
| before the first thread | writing elsewhere than below its own places (Landlock) | `media` |
| all is open | root, its groups and capabilities | `user` |

Guarantees: what the configuration asks for and cannot be had is an error, not a warning. Reading is
never confined: bundles come from wherever the operator has them.
Does not know: what is open.
"""

import contextlib
import logging
import os
import pwd
import stat
from pathlib import Path

import uvicorn

import dualrestore
from dualrestore.config import Configuration, UnixExport
from dualrestore.core import confine_writing, renounce_system_calls
from dualrestore.errors import ConfigurationError, DeviceError
from dualrestore.transport.handing import handing_path

log = logging.getLogger("dualrestore")


def confine(configuration: Configuration) -> None:
    """Gives up what needs no open file. Called before any thread is started: Landlock holds for
    the thread that asks and for those that it starts."""
    _check_user(configuration)
    if configuration.node.media is not None:
        _confine_writing(configuration, configuration.node.media)
    try:
        renounce_system_calls()
    except OSError as problem:
        # A kernel without seccomp; nobody asked for it.
        log.warning("goes on with all system calls: %s", problem)


def _confine_writing(configuration: Configuration, media: tuple[Path, ...]) -> None:
    for place in media:
        if not place.is_dir():
            raise ConfigurationError(
                f"[node] media: expected directories, found {place}, which is none; make it or "
                "remove it from the list"
            )
    places = [*_directories(configuration), *media]
    for volume in configuration.volumes:
        # A file that is to be made needs its directory; a disk is written as what it is.
        device = volume.device
        places.append(device if device.exists() else device.parent)
    confine_writing([str(place) for place in places])
    log.info("writes below %s only", ", ".join(map(str, places)))


def _sockets(configuration: Configuration) -> list[Path]:
    exports = [export for volume in configuration.volumes for export in volume.exports]
    paths = [export.path for export in exports if isinstance(export, UnixExport)]
    control = configuration.node.control
    return [control, handing_path(control), *sorted(set(paths))]


def _directories(configuration: Configuration) -> list[Path]:
    """Our own, made if need be: what does not exist cannot be opened to writing."""
    state = configuration.node.state
    sockets = sorted({path.parent for path in _sockets(configuration)})
    for place, mode in [(state, 0o700), *((place, 0o755) for place in sockets)]:
        try:
            place.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as problem:
            raise DeviceError(
                problem.errno or 5, f"{place}: cannot make the directory: {problem.strerror}"
            ) from problem
    return [state, *sockets]


def _check_user(configuration: Configuration) -> None:
    user = configuration.node.user
    if user is None:
        return
    found = _account(user)
    if os.geteuid() not in {0, found.pw_uid}:
        raise ConfigurationError(
            f"[node] user: expected to be started by root or by {user}, found user "
            f"{os.geteuid()}; start it as root, or remove user"
        )
    if os.geteuid() == 0:
        _check_imports(found)


def _account(user: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(user)
    except (KeyError, ValueError) as problem:
        raise ConfigurationError(
            f"[node] user: expected a user of this system, found {user!r}; make it: useradd "
            f"--system --user-group --no-create-home {user}"
        ) from problem


def become_user(configuration: Configuration) -> None:
    """Becomes the configured user, if there is one. Devices, keys and ports stay open."""
    user = configuration.node.user
    if user is None:
        return
    found = _account(user)
    if os.geteuid() == found.pw_uid:
        return
    _give(configuration.node.state, found.pw_uid, found.pw_gid)
    for path in _sockets(configuration):
        # Only what is there: the exports of a volume, the control socket.
        with contextlib.suppress(FileNotFoundError):
            os.lchown(path, found.pw_uid, found.pw_gid)
    _change(found)
    log.info("goes on as %s", user)


def _change(account: pwd.struct_passwd) -> None:
    os.initgroups(account.pw_name, account.pw_gid)
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)


def _check_imports(account: pwd.struct_passwd) -> None:
    """What is imported later must not fail later: a child becomes the user and looks."""
    for module in (dualrestore, uvicorn, os):
        child = os.fork()
        if child == 0:
            try:
                _change(account)
                os._exit(0 if os.access(str(module.__file__), os.R_OK) else 1)
            finally:
                os._exit(2)
        if os.waitpid(child, 0)[1] != 0:
            raise ConfigurationError(
                f"[node] user: expected Python and this package where {account.pw_name} may read "
                f"them, found {module.__file__}, which it may not; install them in /opt or "
                "/usr/local"
            )


def _give(state: Path, user: int, group: int) -> None:
    """Makes the user the owner of the state directory and what is in it, links not followed. A
    file with a second name is left alone: it may be one of root's that somebody linked there."""
    for _, directories, files, descriptor in os.fwalk(state, follow_symlinks=False):
        os.chown(descriptor, user, group)
        for name in [*directories, *files]:
            entry = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISREG(entry.st_mode) and entry.st_nlink > 1:
                continue
            os.chown(name, user, group, dir_fd=descriptor, follow_symlinks=False)
