"""The configuration file and the environment, read and checked before anything is touched.

Guarantees: an unknown key is an error that names the nearest known one; every value of a
`Configuration` is inside its limits; an address that others can reach has TLS.
Does not know: whether files, devices or hosts exist. The only reader of the environment.
"""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from dualrestore.errors import ConfigurationError, UsageError
from dualrestore.sizes import SIZE_MAX, parse_duration, parse_size

SECTOR_BYTES = 512
BLOCK_BYTES_MIN, BLOCK_BYTES_MAX = 512, 2**20
UNIX_PATH_BYTES_MAX = 107
"""`sun_path` of Linux, without its final zero."""
CONTROL_PATH_BYTES_MAX = UNIX_PATH_BYTES_MAX - len(".in")
"""There is a second socket beside the control socket, with a longer name."""
PORT_MAX = 65535
ASYNC_BYTES, ASYNC_BYTES_MIN = 64 * 2**20, 64 * 2**10
ASYNC_SECONDS, ASYNC_SECONDS_MIN, ASYNC_SECONDS_MAX = 5.0, 0.1, 86_400.0

ALLOWED_BYTES_MAX = 255
"""Of a name of a certificate."""

_FINGERPRINT = re.compile(r"[0-9A-Fa-f]{64}", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class Address(NamedTuple):
    """A TCP address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it (of names, only localhost is known to be so)."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


class BackupAddress(NamedTuple):
    """Where a backup of a primary volume is: `HOST:PORT/NAME`."""

    address: Address
    name: str

    def __str__(self) -> str:
        return f"{self.address}/{self.name}"


class UnixExport(NamedTuple):
    """An NBD listener on a Unix socket: `unix:/PATH`."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


class TcpExport(NamedTuple):
    """An NBD listener on TCP: `tcp:HOST:PORT`."""

    address: Address

    def __str__(self) -> str:
        return f"tcp:{self.address}"


Export = UnixExport | TcpExport


class NodeConfiguration(NamedTuple):
    """This daemon. With `user` it goes on as that user once all is open; with `media` it writes
    below these directories, its own and nowhere else."""

    state: Path
    control: Path
    listen: Address | None
    tls: Path | None
    user: str | None = None
    media: tuple[Path, ...] | None = None


class VolumeConfiguration(NamedTuple):
    """One volume. `size` in bytes; None means the device's own."""

    name: str
    role: Literal["primary", "backup"]
    device: Path
    size: int | None
    block_size: int
    backups: tuple[BackupAddress, ...]
    exports: tuple[Export, ...]
    allow: tuple[str, ...] | None
    mirror: Literal["flush", "write", "async"]
    async_bytes: int
    async_ms: int
    missing_deadline_ms: int
    direct: bool


class Configuration(NamedTuple):
    """A whole file."""

    node: NodeConfiguration
    volumes: tuple[VolumeConfiguration, ...]


class _RawNode(msgspec.Struct):
    state: str
    control: str
    listen: str | None = None
    tls: str | None = None
    user: str | None = None
    media: list[str] | None = None


class _RawVolume(msgspec.Struct):
    role: Literal["primary", "backup"]
    device: str
    size: str | int | None = None
    block_size: str | int = "4KiB"
    backups: list[str] = []
    export: list[str] = []
    allow: list[str] | None = None
    mirror: Literal["flush", "write", "async"] = "flush"
    async_bytes: str | int | None = None
    async_seconds: float | None = None
    missing_deadline: str = "30s"
    direct: bool = False


class _RawFile(msgspec.Struct):
    node: _RawNode
    volume: dict[str, _RawVolume] = {}


def parse_address(text: str) -> Address:
    """`HOST:PORT`; an IPv6 address stands in brackets."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError as problem:
            raise ConfigurationError(
                f"expected an IPv6 address inside the brackets, found {text!r}"
            ) from problem
    elif ":" in host:
        raise ConfigurationError(
            f"expected HOST:PORT with an IPv6 address in brackets such as [::1]:10810, "
            f"found {text!r}"
        )
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) <= PORT_MAX):
        raise ConfigurationError(
            f"expected HOST:PORT with a port from 1 to {PORT_MAX}, found {text!r}"
        )
    return Address(host, int(port))


def parse_backup(text: str) -> BackupAddress:
    """`HOST:PORT/NAME`."""
    address, slash, name = text.partition("/")
    if not slash:
        raise ConfigurationError(
            f"expected HOST:PORT/NAME, the volume's name at the backup last, found {text!r}"
        )
    return BackupAddress(parse_address(address), check_name(name))


def parse_export(text: str) -> Export:
    """`unix:/PATH` or `tcp:HOST:PORT`."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return UnixExport(_socket_path(rest, "export"))
    if kind == "tcp":
        return TcpExport(parse_address(rest))
    raise ConfigurationError(f"expected an export unix:/PATH or tcp:HOST:PORT, found {text!r}")


def _allow(names: list[str] | None, exports: Iterable[Export], *, has_tls: bool) -> None:
    """Whom the exports are for: names or fingerprints of certificates, which only TLS shows."""
    if names is None:
        return
    if not has_tls:
        raise ConfigurationError(
            "allow: expected tls in [node], found none: only a certificate tells clients apart"
        )
    if not any(isinstance(export, TcpExport) for export in exports):
        raise ConfigurationError(
            "allow: expected a tcp: export, found none: on a Unix socket the file's permissions "
            "say who may connect; remove the key"
        )
    for name in names:
        fingerprint = name.removeprefix("sha256:")
        digits = fingerprint.replace(":", "")
        if name != fingerprint and not _FINGERPRINT.fullmatch(digits):
            raise ConfigurationError(
                f"allow: expected 64 hexadecimal digits after sha256:, found {name!r}"
            )
        if not 0 < len(name.encode()) <= ALLOWED_BYTES_MAX or not name.isprintable():
            raise ConfigurationError(
                f"allow: expected the name of a certificate (at most {ALLOWED_BYTES_MAX} bytes) "
                f"or sha256: and its fingerprint, found {name!r}"
            )


def check_name(name: str) -> str:
    """A volume's name: a word that is safe in addresses, file names and export names."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            "expected a volume name of at most 64 letters, digits, dots, dashes and underscores, "
            f"found {name!r}"
        )
    return name


def _path(text: str, key: str) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise ConfigurationError(f"{key}: expected an absolute path, found {text!r}")
    return Path(text)


def _socket_path(text: str, key: str, most: int = UNIX_PATH_BYTES_MAX) -> Path:
    if not text.startswith("/") or "\0" in text:
        raise ConfigurationError(f"{key}: expected an absolute path of a socket, found {text!r}")
    if len(os.fsencode(text)) > most:
        raise ConfigurationError(
            f"{key}: expected a socket path of at most {most} bytes (a limit of "
            f"the system), found {len(os.fsencode(text))}: {text!r}"
        )
    return Path(text)


def _check_keys(where: str, found: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for key in found:
        if key in names:
            continue
        nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(names)}"
        raise ConfigurationError(f"{where}: unknown key {key!r}; {hint}")


def _check_document(document: Mapping[str, Any]) -> None:
    _check_keys("the file", document, _RawFile.__struct_fields__)
    node = document.get("node")
    if isinstance(node, dict):
        _check_keys("[node]", node, _RawNode.__struct_fields__)
    volumes = document.get("volume")
    if isinstance(volumes, dict):
        for name, volume in volumes.items():
            if isinstance(volume, dict):
                _check_keys(f"[volume.{name}]", volume, _RawVolume.__struct_fields__)


def _size(key: str, value: str | int | None) -> int | None:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as problem:
        raise ConfigurationError(f"{key}: {problem}") from problem


def _geometry(raw: _RawVolume) -> tuple[int | None, int]:
    size, block_size = _size("size", raw.size), _size("block_size", raw.block_size) or 0
    if not (
        BLOCK_BYTES_MIN <= block_size <= BLOCK_BYTES_MAX and block_size & (block_size - 1) == 0
    ):
        raise ConfigurationError(
            f"block_size: expected a power of two from 512 to 1MiB, found {raw.block_size!r}"
        )
    if size is not None and (not 0 < size <= SIZE_MAX or size % SECTOR_BYTES):
        raise ConfigurationError(
            f"size: expected a multiple of {SECTOR_BYTES} bytes above zero and at most {SIZE_MAX}, "
            f"found {raw.size!r}"
        )
    return size, block_size


def _lag_bound(raw: _RawVolume) -> tuple[int, int]:
    """Bytes and milliseconds."""
    given = raw.async_bytes is not None or raw.async_seconds is not None
    if given and raw.mirror != "async":
        raise ConfigurationError(
            'async_bytes, async_seconds: only mirror = "async" lets the backup lag, found '
            f"mirror = {raw.mirror!r}; remove them"
        )
    size = _size("async_bytes", raw.async_bytes)
    size = ASYNC_BYTES if size is None else size
    seconds = ASYNC_SECONDS if raw.async_seconds is None else raw.async_seconds
    if not ASYNC_BYTES_MIN <= size <= SIZE_MAX:
        raise ConfigurationError(f"async_bytes: expected 64KiB or more, found {raw.async_bytes!r}")
    if not ASYNC_SECONDS_MIN <= seconds <= ASYNC_SECONDS_MAX:
        raise ConfigurationError(
            f"async_seconds: expected a number of seconds from {ASYNC_SECONDS_MIN:g} to "
            f"{ASYNC_SECONDS_MAX:g}, found {raw.async_seconds!r}"
        )
    return size, round(seconds * 1000)


def _volume(name: str, raw: _RawVolume, *, has_tls: bool) -> VolumeConfiguration:
    check_name(name)
    size, block_size = _geometry(raw)
    backups = tuple(parse_backup(text) for text in raw.backups)
    exports = tuple(parse_export(text) for text in raw.export)
    if raw.role == "primary" and not backups:
        raise ConfigurationError("backups: a primary volume needs at least one HOST:PORT/NAME")
    if raw.role == "backup" and backups:
        raise ConfigurationError("backups: only a primary volume has them; remove the key")
    async_bytes, async_ms = _lag_bound(raw)
    device = _path(raw.device, "device")
    reachable = [backup.address for backup in backups]
    reachable += [export.address for export in exports if isinstance(export, TcpExport)]
    for address in reachable:
        _require_tls(address, has_tls=has_tls)
    _allow(raw.allow, exports, has_tls=has_tls)
    return VolumeConfiguration(
        name=name,
        role=raw.role,
        device=device,
        size=size,
        block_size=block_size,
        backups=backups,
        exports=exports,
        allow=tuple(raw.allow) if raw.allow is not None else None,
        mirror=raw.mirror,
        async_bytes=async_bytes,
        async_ms=async_ms,
        missing_deadline_ms=round(parse_duration(raw.missing_deadline) * 1000),
        direct=raw.direct,
    )


def _require_tls(address: Address, *, has_tls: bool) -> None:
    if not address.is_loopback and not has_tls:
        raise ConfigurationError(
            f"{address}: expected TLS on an address that is not loopback; set tls in [node] to a "
            "directory with ca-cert.pem and the certificates and keys of server and client"
        )


def _media(texts: list[str] | None) -> tuple[Path, ...] | None:
    return None if texts is None else tuple(_path(text, "[node] media") for text in texts)


def _check_shared(volumes: Iterable[VolumeConfiguration]) -> None:
    devices: dict[Path, str] = {}
    for volume in volumes:
        other = devices.setdefault(volume.device, volume.name)
        if other != volume.name:
            raise ConfigurationError(
                f"[volume.{volume.name}] device: {volume.device} is already the device of {other}"
            )


def read_configuration(text: str) -> Configuration:
    """The configuration that a TOML text says.

    >>> text = '[node]\\nstate = "/s"\\ncontrol = "/c.sock"\\n'
    >>> read_configuration(text).node.control
    PosixPath('/c.sock')
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        # Also numbers of thousands of digits, and brackets in brackets without end.
        raise ConfigurationError(f"expected TOML, found {problem}") from problem
    _check_document(document)
    try:
        raw = msgspec.convert(document, _RawFile)
    except msgspec.ValidationError as problem:
        raise ConfigurationError(
            str(problem).replace("$.", "").replace("Object", "it")
        ) from problem
    listen = parse_address(raw.node.listen) if raw.node.listen is not None else None
    if listen is not None:
        _require_tls(listen, has_tls=raw.node.tls is not None)
    volumes = []
    for name, volume in raw.volume.items():
        try:
            volumes.append(_volume(name, volume, has_tls=raw.node.tls is not None))
        except UsageError as problem:
            raise ConfigurationError(f"[volume.{name}] {problem}") from problem
    if listen is None and any(volume.role == "backup" for volume in volumes):
        raise ConfigurationError("[node] listen: a node with a backup volume needs HOST:PORT")
    _check_shared(volumes)
    node = NodeConfiguration(
        state=_path(raw.node.state, "[node] state"),
        control=_socket_path(raw.node.control, "[node] control", CONTROL_PATH_BYTES_MAX),
        listen=listen,
        tls=None if raw.node.tls is None else _path(raw.node.tls, "[node] tls"),
        user=raw.node.user,
        media=_media(raw.node.media),
    )
    return Configuration(node, tuple(volumes))


def load_configuration(path: Path) -> Configuration:
    """The configuration in a file."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise ConfigurationError(
            f"{path}: cannot read the configuration: {reason}; "
            "`dualrestore init` writes one to start from"
        ) from problem
    try:
        return read_configuration(text)
    except ConfigurationError as problem:
        raise ConfigurationError(f"{path}: {problem}") from problem


def configured_path(option: str | None) -> Path:
    """The configuration file that the option or else `DUALRESTORE_CONFIG` names."""
    chosen = option or os.environ.get("DUALRESTORE_CONFIG")
    if not chosen:
        raise UsageError(
            "expected a configuration file, found none; pass -c FILE or set DUALRESTORE_CONFIG"
        )
    return Path(chosen)


def debugging() -> bool:
    """Whether tracebacks are wanted: `DUALRESTORE_DEBUG=1`."""
    return os.environ.get("DUALRESTORE_DEBUG", "") not in {"", "0"}


def notify_socket() -> str | None:
    """Where systemd wants to be told that we are ready."""
    return os.environ.get("NOTIFY_SOCKET") or None


def state_home() -> Path:
    """Where what outlives a command is kept for this user: `XDG_STATE_HOME` or its default."""
    chosen = os.environ.get("XDG_STATE_HOME", "")
    base = Path(chosen) if chosen.startswith("/") else Path.home() / ".local" / "state"
    return base / "dualrestore"
