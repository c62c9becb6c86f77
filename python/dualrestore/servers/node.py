"""What a daemon holds open: volumes, the hub and sockets of their links, NBD doors.

Guarantees: `open` takes all or nothing; `close` stops the guests first, then the links, then the
volumes, so that what was acknowledged is durable and the stop is clean. One process per state
directory. Does not know: HTTP.
"""

import contextlib
import fcntl
import functools
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualrestore import __version__
from dualrestore.config import (
    Configuration,
    Export,
    TcpExport,
    VolumeConfiguration,
)
from dualrestore.core import BackupVolume, LinkHub, NbdServer, PrimaryVolume
from dualrestore.errors import (
    BusyError,
    DeviceError,
    DualRestoreError,
    LinkError,
    UsageError,
)
from dualrestore.servers.alarms import warnings_of
from dualrestore.transport.handing import handing_path
from dualrestore.transport.link import LinkTransport
from dualrestore.transport.loop import LoopThread
from dualrestore.transport.nbd_door import NbdDoor
from dualrestore.transport.sockets import check_tcp_free, check_unix_free
from dualrestore.transport.tls import tls_context, tls_parts

if TYPE_CHECKING:
    from ssl import SSLContext

log = logging.getLogger("dualrestore")

LOCK = "lock"
SHUTDOWN_MS = 5_000
HYDRATION_WISH = "hydrate"
"""An empty file beside the volume's others: missing blocks are to be brought over the link too."""


class Node:
    """Everything that one configuration says, open."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.primaries: dict[str, PrimaryVolume] = {}
        self.backups: dict[str, BackupVolume] = {}
        self.client_tls: SSLContext | None = None
        """With which this node connects to others."""
        self._began = time.monotonic()
        self._cleanup = contextlib.ExitStack()
        self._doors: dict[Export, NbdDoor] = {}
        self._exporting = threading.Lock()
        self._transport: LinkTransport | None = None
        self._made: list[Path] = []

    def open(self) -> None:
        """Opens all of it, or raises and leaves nothing open, and no directory made."""
        try:
            with self._cleanup:
                self._open()
                self._cleanup = self._cleanup.pop_all()
        except BaseException:
            for path in reversed(self._made):
                with contextlib.suppress(OSError):
                    path.unlink() if path.name == LOCK else path.rmdir()
            raise

    def _open(self) -> None:
        node = self.configuration.node
        if node.state.exists():
            # A second daemon of the same configuration meets the lock before the addresses.
            self._lock()
            self._check_addresses()
        else:
            self._check_addresses()
            self._make_directory(node.state)
            self._lock()
        # Kept, for the user that the daemon becomes may not read the keys.
        client_tls = self.client_tls = tls_context(node.tls, "client") if node.tls else None
        server_tls = tls_context(node.tls, "server") if node.tls else None
        for volume in self.configuration.volumes:
            self._open_volume(volume)
        thread = LoopThread("dualrestore-transport")
        self._cleanup.callback(thread.stop)
        hub = LinkHub()
        self._cleanup.callback(hub.close)
        transport = LinkTransport(hub, thread, client_tls=client_tls, server_tls=server_tls)
        self._transport = transport
        transport.start()
        self._cleanup.callback(transport.stop)
        for backup in self.backups.values():
            hub.serve(backup)
        if node.listen is not None:
            transport.listen(node.listen)
        for volume in self.configuration.volumes:
            for number, where in enumerate(volume.backups):
                transport.connect(self.primaries[volume.name], number, where)
        self._cleanup.callback(self._flush)
        self._open_doors(thread)

    def _check_addresses(self) -> None:
        # Before anything is made: what cannot be reached need not begin to exist.
        node = self.configuration.node
        check_unix_free(node.control)
        check_unix_free(handing_path(node.control))
        if node.listen is not None:
            check_tcp_free(node.listen)
        for export in {
            export for volume in self.configuration.volumes for export in volume.exports
        }:
            if isinstance(export, TcpExport):
                check_tcp_free(export.address)
            else:
                check_unix_free(export.path)

    def _make_directory(self, path: Path) -> None:
        missing = [place for place in [path, *path.parents] if not place.exists()]
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as problem:
            raise DeviceError(
                problem.errno or 5, f"{path}: cannot make the directory: {problem.strerror}"
            ) from problem
        finally:
            self._made += reversed(missing)

    def _lock(self) -> None:
        path = self.configuration.node.state / LOCK
        existed = path.exists()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as problem:
            raise DeviceError(
                problem.errno or 5, f"{path}: cannot be opened: {problem.strerror}"
            ) from problem
        if not existed:
            self._made.append(path)
        self._cleanup.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise BusyError(
                f"{path.parent}: expected to be the only daemon of this state directory, found "
                "another one running; stop it first"
            ) from problem

    def _open_volume(self, volume: VolumeConfiguration) -> None:
        place = self.configuration.node.state / volume.name
        self._make_directory(place)
        opened: PrimaryVolume | BackupVolume
        if volume.role == "primary":
            opened = self.primaries[volume.name] = PrimaryVolume.open(
                str(place),
                volume.name,
                str(volume.device),
                size=volume.size,
                block_size=volume.block_size,
                mirror=volume.mirror,
                async_bytes=volume.async_bytes,
                async_ms=volume.async_ms,
                backups=len(volume.backups),
                missing_deadline_ms=volume.missing_deadline_ms,
                direct=volume.direct,
            )
            if (place / HYDRATION_WISH).exists() and opened.status()["state"] != "waiting":
                opened.hydrate(True)
        else:
            opened = self.backups[volume.name] = BackupVolume.open(
                str(place),
                volume.name,
                str(volume.device),
                size=volume.size,
                block_size=volume.block_size,
                direct=volume.direct,
            )
        self._cleanup.callback(opened.close)

    def _open_doors(self, thread: LoopThread) -> None:
        by_export: dict[Export, list[VolumeConfiguration]] = {}
        for volume in self.configuration.volumes:
            for export in volume.exports:
                by_export.setdefault(export, []).append(volume)
        pki = self.configuration.node.tls
        for export, volumes in by_export.items():
            with_tls = pki is not None and _needs_tls(export, volumes)
            server = NbdServer(tls_parts(pki) if with_tls and pki is not None else None)
            for volume in volumes:
                if volume.role == "primary":
                    allowed = _allowed(volume, export)
                    server.add_volume(volume.name, self.primaries[volume.name], allowed)
            # Snapshots are cut in the primary's stream and nobody here is told, so whoever
            # connects is what makes us look.
            backups = [volume for volume in volumes if volume.role == "backup"]
            prepare = functools.partial(self._export_all, backups) if backups else None
            door = NbdDoor(thread, server, export, prepare)
            door.open()
            self._doors[export] = door
            self._cleanup.callback(_shut, door)

    def _export_all(self, volumes: list[VolumeConfiguration]) -> None:
        for volume in volumes:
            try:
                self._export_snapshots(volume)
            except DualRestoreError as problem:
                log.warning("%s: cannot export its snapshots: %s", volume.name, problem)

    def _export_snapshots(self, volume: VolumeConfiguration) -> None:
        backup = self.backups[volume.name]
        with self._exporting:
            wanted = {
                f"{volume.name}@{snapshot['snapshot']}": snapshot["snapshot"]
                for snapshot in backup.snapshots()
                if not snapshot["broken"]
            }
            for export in volume.exports:
                server = self._doors[export].server
                prefix = f"{volume.name}@"
                held = {name for name in server.exports() if name.startswith(prefix)}
                for name in held - wanted.keys():
                    server.remove(name)
                allowed = _allowed(volume, export)
                for name in wanted.keys() - held:
                    server.add_snapshot(name, backup, wanted[name], allowed)

    def delete_snapshot(self, name: str, snapshot: str) -> None:
        """Takes its export away first: sessions hold a snapshot open."""
        backup = self.backup(name)
        with self._exporting:
            for door in self._doors.values():
                door.server.remove(f"{name}@{snapshot}")
            backup.delete_snapshot(snapshot)

    def _flush(self) -> None:
        # The guests are gone and the links still up: what they wrote last reaches the backups.
        for name, volume in self.primaries.items():
            try:
                volume.flush()
            except DualRestoreError as problem:
                log.warning("%s: the last flush failed: %s", name, problem)

    def close(self) -> None:
        """Stops cleanly: nothing new is accepted, what is in flight ends, all is made durable."""
        self._cleanup.close()

    def primary(self, name: str) -> PrimaryVolume:
        """The primary volume of that name."""
        self._check_name(name)
        if name not in self.primaries:
            raise UsageError(
                f"{name}: expected a volume in the role primary, found the role backup; "
                "ask the daemon of the primary"
            )
        return self.primaries[name]

    def backup(self, name: str) -> BackupVolume:
        """The backup volume of that name."""
        self._check_name(name)
        if name not in self.backups:
            raise UsageError(
                f"{name}: expected a volume in the role backup, found the role primary; "
                "ask the daemon of the backup"
            )
        return self.backups[name]

    def _check_name(self, name: str) -> None:
        names = [volume.name for volume in self.configuration.volumes]
        if name not in names:
            known = ", ".join(names) if names else "none"
            raise UsageError(f"expected a volume of this daemon ({known}), found {name!r}")

    @contextlib.contextmanager
    def explaining_link(self, name: str) -> Iterator[None]:
        """A link that is down is told with what keeps it down, as `status` shows it."""
        try:
            yield
        except LinkError as problem:
            [volume] = [one for one in self.configuration.volumes if one.name == name]
            backups = self.volume_status(volume)["backups"]
            reasons = [f"{one['address']}: {one['error']}" for one in backups if one["error"]]
            told = "; ".join(reasons) or "its backup did not say why"
            raise LinkError(
                f"{name}: {problem} ({told}); try again when it is up, `status` shows it"
            ) from problem

    def volume_status(self, volume: VolumeConfiguration) -> dict[str, Any]:
        """As `model.PrimaryStatus` or `model.BackupStatus`."""
        doors = [self._doors[export] for export in volume.exports if export in self._doors]
        common = {
            "name": volume.name,
            "role": volume.role,
            "exports": [str(export) for export in volume.exports],
            "connections": sum(len(door.server.connections()) for door in doors),
        }
        if volume.role == "backup":
            status = self.backups[volume.name].status()
            return {**status, **common, "warnings": warnings_of(volume.name, status)}
        primary = self.primaries[volume.name]
        status = primary.status()
        assert self._transport is not None
        for number, (backup, where) in enumerate(
            zip(status["backups"], volume.backups, strict=True)
        ):
            backup["address"] = str(where)
            errors = self._transport.line_errors(primary, number)
            if not backup.get("error") and errors:
                backup["error"] = errors[0]
        return {**status, **common}

    def hydrate(self, name: str, *, enabled: bool) -> None:
        """Whether missing blocks are brought in the background; a restart does not forget it."""
        volume = self.primary(name)
        wish = self.configuration.node.state / name / HYDRATION_WISH
        try:
            if enabled:
                wish.touch(mode=0o600)
            else:
                wish.unlink(missing_ok=True)
        except OSError as problem:
            raise DeviceError(
                problem.errno or 5, f"{wish}: cannot be kept: {problem.strerror}"
            ) from problem
        volume.hydrate(enabled)

    def hurry(self, volume: "PrimaryVolume") -> None:
        """The volume has something new to say: its links need not wait to be tried again."""
        assert self._transport is not None
        self._transport.hurry(volume)

    def status(self) -> dict[str, Any]:
        """As `model.NodeStatus`, without its jobs."""
        assert self._transport is not None
        return {
            "version": __version__,
            "seconds_up": time.monotonic() - self._began,
            "link_bytes_sent": self._transport.bytes_sent,
            "link_bytes_received": self._transport.bytes_received,
            "volumes": [self.volume_status(volume) for volume in self.configuration.volumes],
        }


def _needs_tls(export: Export, volumes: list[VolumeConfiguration]) -> bool:
    """An address that others reach, or where somebody must show a certificate."""
    if not isinstance(export, TcpExport):
        return False
    return not export.address.is_loopback or any(volume.allow is not None for volume in volumes)


def _allowed(volume: VolumeConfiguration, export: Export) -> list[str] | None:
    """For whom; on a Unix socket for whoever may connect to it."""
    if volume.allow is None or not isinstance(export, TcpExport):
        return None
    return list(volume.allow)


def _shut(door: NbdDoor) -> None:
    door.close()
    if not door.server.shutdown(SHUTDOWN_MS):
        log.warning("%s: sessions did not end in time", door.export)
