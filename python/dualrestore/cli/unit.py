"""A systemd unit for the daemon of one configuration: closed but for what the daemon does.

Guarantees: names the devices, directories and ports of that configuration and no others; its
exposure as `systemd-analyze security` counts it is at most 2.0 (a test asks it).
Does not know: whether devices exist on another host; what is no file here is taken for a device.
"""

from collections.abc import Iterable
from pathlib import Path

from dualrestore.config import Configuration, TcpExport, UnixExport
from dualrestore.errors import UsageError

PRIVILEGED_PORTS = 1024
"""Ports below it are root's."""

_HEAD = """\
# Runs `dualrestore serve` as an ordinary user, with no capability, in a sandbox.
# Made by: dualrestore -c {configuration} init --systemd
#
#   useradd --system --user-group --no-create-home --shell /usr/sbin/nologin dualrestore
#   dualrestore -c {configuration} init --systemd /etc/systemd/system/dualrestore.service
#   systemctl daemon-reload && systemctl enable --now dualrestore
#
# The configuration and the certificates must be readable by that user, keys by nobody else
# (chown dualrestore, chmod 0600). Verbs are run by root or by that user: the control socket takes
# nobody else. How closed it is: systemd-analyze security dualrestore.service

[Unit]
Description=dualrestore: volumes restored over two channels
Documentation=https://github.com/dualrestore/dualrestore
Wants=network-online.target
After=network-online.target local-fs.target

[Service]
Type=notify
ExecStart={program} serve -c {configuration}
Restart=on-failure
RestartSec=2
# A wrong configuration and a foreign device (exit codes 2 and 5) stay wrong.
RestartPreventExitStatus=2 5
# What is in flight ends, what was acknowledged becomes durable.
TimeoutStopSec=90
LimitNOFILE=65536
# A dump would hold keys and blocks.
LimitCORE=0

User=dualrestore
Group=dualrestore
UMask=0077
"""

_CLOSED = """\

# Everything else of the system is read-only. Home directories can be read, and /tmp is the
# system's, because `merge` and `attach` take bundles from where the operator has them. A medium
# that is mounted later is seen.
ProtectSystem=strict
PrivateMounts=yes
ProtectHome=read-only
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
NoNewPrivileges=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
LockPersonality=yes
MemoryDenyWriteExecute=yes
RemoveIPC=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources @keyring userfaultfd
# io_uring has been a way out of sandboxes. Without it bundles are merged by threads; on a fast
# disk that is slower. Remove this line to have it.
SystemCallFilter=~io_uring_setup io_uring_enter io_uring_register

[Install]
WantedBy=multi-user.target
"""


def unit(configuration: Configuration, file: Path, program: Path) -> str:
    """The unit's text. `file` is where the configuration is, `program` the command `dualrestore`.

    Raises `UsageError` for a socket that lies in /run itself, where only root may make one.
    """
    parts = [_HEAD.format(program=_word(program), configuration=_word(file))]
    parts.append(_directories(configuration))
    parts.append(_devices(configuration))
    parts.append(_capabilities(configuration))
    parts.append(_CLOSED)
    return "".join(parts)


def _word(path: Path) -> str:
    """A path as a word of a unit file."""
    text = str(path).replace("%", "%%").replace("$", "$$")
    if any(symbol in text for symbol in " \t'\"\\;"):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _place(path: Path) -> str:
    """A path as a setting that names places."""
    text = str(path).replace("%", "%%")
    if any(symbol in text for symbol in " \t'\"\\"):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _below(paths: Iterable[Path], top: Path) -> tuple[list[str], list[Path]]:
    """Names of those below `top` as systemd makes them there, and the others."""
    inside: set[str] = set()
    others: set[Path] = set()
    for path in paths:
        if path != top and path.is_relative_to(top):
            inside.add(_place(path.relative_to(top)))
        else:
            others.add(path)
    return sorted(inside), sorted(others)


def _socket_directories(configuration: Configuration) -> set[Path]:
    sockets = {configuration.node.control}
    for volume in configuration.volumes:
        sockets |= {one.path for one in volume.exports if isinstance(one, UnixExport)}
    for socket in sorted(sockets):
        if socket.parent in {Path("/run"), Path("/var/run")}:
            raise UsageError(
                f"{socket}: expected a socket in a directory of its own, found it in "
                f"{socket.parent}, where only root may make one; name it "
                f"/run/dualrestore/{socket.name} in the configuration"
            )
    return {socket.parent for socket in sockets}


def _directories(configuration: Configuration) -> str:
    state, others = _below([configuration.node.state], Path("/var/lib"))
    run, more = _below(_socket_directories(configuration), Path("/run"))
    files = {volume.device.parent for volume in configuration.volumes if _is_file(volume.device)}
    lines = ["\n# Maps, snapshots and jobs; the control socket and NBD sockets.\n"]
    if state:
        lines += [f"StateDirectory={' '.join(state)}\n", "StateDirectoryMode=0700\n"]
    if run:
        lines.append(f"RuntimeDirectory={' '.join(run)}\n")
    written = sorted({*others, *more, *files})
    if written:
        lines.append("# Named in the configuration: they must exist and belong to that user.\n")
        lines.append(f"ReadWritePaths={' '.join(map(_place, written))}\n")
    lines.append("# Where `bundle create` writes. Add more, one line each.\n")
    lines.append("ReadWritePaths=-/media -/mnt -/run/media\n")
    return "".join(lines)


def _is_file(device: Path) -> bool:
    return device.is_file() or not device.is_relative_to("/dev")


def _devices(configuration: Configuration) -> str:
    devices = [one.device for one in configuration.volumes if not _is_file(one.device)]
    lines = ["\n# The volumes' disks and no others, though the group disk may open them all.\n"]
    lines.append("DevicePolicy=closed\n")
    if devices:
        lines.append("SupplementaryGroups=disk\n")
    lines += [f"DeviceAllow={_place(device)} rw\n" for device in devices]
    lines.append("# A bundle that lies on a disk itself (tar) is read and made with one more:\n")
    lines.append("# DeviceAllow=/dev/sdX rw\n")
    return "".join(lines)


def _capabilities(configuration: Configuration) -> str:
    addresses = [configuration.node.listen] if configuration.node.listen else []
    for volume in configuration.volumes:
        addresses += [one.address for one in volume.exports if isinstance(one, TcpExport)]
    if any(address.port < PRIVILEGED_PORTS for address in addresses):
        return (
            "\n# A port below 1024 is listened on.\n"
            "CapabilityBoundingSet=CAP_NET_BIND_SERVICE\n"
            "AmbientCapabilities=CAP_NET_BIND_SERVICE\n"
        )
    return "\n# None is needed.\nCapabilityBoundingSet=\nAmbientCapabilities=\n"
