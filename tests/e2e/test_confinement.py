"""A daemon that gave things up still does all that it is for: as another user, writing at its media
only, and under the system calls that its systemd unit leaves it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import dualrestore as dr
from dualrestore.cli.commands.init import starter
from dualrestore.cli.unit import unit
from dualrestore.config import read_configuration
from tests.e2e.harness import MIB, VOLUME, Daemon, Pair, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIZE = 8 * MIB
NOBODY = 65534
NO_PERMISSION = "Permission denied"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Not yet started."""
    made = Pair(SIZE)
    try:
        yield made
    finally:
        for daemon in (made.primary, made.backup):
            print(daemon.words()[-4000:])
        made.close()


def configure(daemon: Daemon, lines: str) -> None:
    """Adds to [node]."""
    text = daemon.configuration.read_text()
    daemon.configuration.write_text(text.replace("[node]\n", f"[node]\n{lines}\n"))


def whole_method(pair: Pair, medium: Path) -> None:
    """Mirrored, lost, restored from a medium, mirrored again."""
    run(["qemu-io", "-f", "raw", "-c", "write -P 5 0 4M", "-c", "flush", pair.uri])
    pair.wait_mirrored()
    cut = pair.snapshot()
    pair.backup.verb("bundle", "create", f"{VOLUME}@{cut}", "--to", medium)
    pair.primary.verb("restore", VOLUME, "--lost", "all")
    pair.primary.verb("attach", medium, VOLUME)
    report = pair.primary.verb_json("merge", medium, VOLUME)
    assert report["bytes_written"] + report["bytes_zeroed"] > 0, report
    pair.primary.verb("restore", VOLUME, "--lost", "0-1MiB", "--wire")
    pair.wait_mirrored()
    run(["qemu-io", "-f", "raw", "-c", "read -P 5 0 4M", "-c", "read -P 0 4M 4M", pair.uri])
    pair.backup.verb("snapshot", VOLUME, "--delete", cut)


def identity_of(daemon: Daemon) -> dict[str, set[str]]:
    """Users, groups and capabilities of all its threads."""
    assert daemon.process is not None
    found: dict[str, set[str]] = {}
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            name, value = line.split(":", 1)
            if name in {"Uid", "Gid", "Groups", "CapEff", "CapPrm", "NoNewPrivs"}:
                found.setdefault(name, set()).add(" ".join(value.split()))
    return found


# Another user


@pytest.fixture
def readable() -> Iterator[list[str]]:
    """What starts a Python that any user may read, wherever this one is: the same packages, seen at
    another place of our own mounts."""
    top = Path(tempfile.mkdtemp(prefix="dr-site-", dir="/var/tmp"))
    top.chmod(0o755)
    package = Path(dr.__file__).parent.parent
    packages = [Path(place) for place in sys.path if place.endswith("-packages")]
    mounted = []
    try:
        for number, site in enumerate([Path(sys.base_prefix), package, *packages]):
            place = top / str(number)
            place.mkdir()
            run(["mount", "--bind", site, place])
            mounted.append(place)
        home, *rest = map(str, mounted)
        words = [
            f"PYTHONHOME={home}",
            f"PYTHONPATH={':'.join(rest)}",
            f"LD_LIBRARY_PATH={home}/lib",
        ]
        python = Path(home, Path(sys.executable).resolve().relative_to(sys.base_prefix))
        yield ["env", *words, str(python), "-c", "from dualrestore.cli import main; main()"]
    finally:
        for place in mounted:
            run(["umount", "--lazy", place])
        shutil.rmtree(top, ignore_errors=True)


def launch(daemon: Daemon, command: list[str], **more: Any) -> None:
    """Starts it by this command, and waits until it answers."""
    with daemon.log.open("ab") as log:
        daemon.process = subprocess.Popen(
            [*command, "serve", "-c", daemon.configuration],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, **more,
        )  # fmt: skip
    wait_until("it answers", lambda: daemon.answers() or not daemon.alive)
    assert daemon.alive, f"exit code {daemon.process.poll()}: {daemon.words()}"


def await_nobody(daemon: Daemon) -> None:
    """Until this start of it has become that user."""
    started = f"serving 1 volumes; control socket {daemon.control}"
    begun = daemon.words().count("stopped cleanly") + 1
    wait_until("it became nobody", lambda: daemon.words().count(started) == begun)
    assert daemon.words().count("goes on as nobody") == begun


@pytest.mark.root
def test_a_daemon_started_by_root_goes_on_as_its_user_and_is_started_again(
    pair: Pair, readable: list[str]
) -> None:
    pair.directory.chmod(0o755)
    medium = pair.directory / "medium"
    medium.mkdir()
    os.chown(medium, NOBODY, NOBODY)
    for daemon in (pair.backup, pair.primary):
        configure(daemon, 'user = "nobody"')
    for start in ("first", "second"):
        for daemon in (pair.backup, pair.primary):
            launch(daemon, readable)
            await_nobody(daemon)
            group = str(daemon.control.stat().st_gid)
            assert identity_of(daemon) == {
                "Uid": {" ".join([str(NOBODY)] * 4)}, "Gid": {" ".join([group] * 4)},
                "Groups": {group}, "CapEff": {"0" * 16}, "CapPrm": {"0" * 16},
                "NoNewPrivs": {"1"},
            }  # fmt: skip
        if start == "first":
            whole_method(pair, medium / "b")
        pair.wait_mirrored()
        assert {path.stat().st_uid for path in (medium / "b").iterdir()} == {NOBODY}
        pair.primary.stop()
        pair.backup.stop()
    assert "Traceback" not in pair.primary.words() + pair.backup.words()


@pytest.mark.root
@pytest.mark.parametrize(
    ("user", "started_by", "says"),
    [("nosuchuser", 0, "useradd"), ("daemon", NOBODY, "started by root or by daemon")],
)
def test_a_user_that_cannot_be_become_is_refused_before_anything_is_made(
    pair: Pair, readable: list[str], user: str, started_by: int, says: str
) -> None:
    pair.directory.chmod(0o755)
    shutil.rmtree(pair.directory / "backup-state")
    configure(pair.backup, f'user = "{user}"')
    command: list[str | Path] = [*readable, "serve", "-c", pair.backup.configuration]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, user=started_by, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (pair.directory / "backup-state").exists()
    assert not pair.mirror_device.exists()


@pytest.mark.root
def test_what_somebody_linked_into_the_state_directory_does_not_become_the_users(
    pair: Pair, readable: list[str]
) -> None:
    pair.directory.chmod(0o755)
    state = pair.directory / "backup-state"
    roots, linked = pair.directory / "roots", state / "linked"
    roots.write_text("root's")
    linked.hardlink_to(roots)
    (state / "link").symlink_to(roots)
    configure(pair.backup, 'user = "nobody"')
    launch(pair.backup, readable)
    await_nobody(pair.backup)
    assert (state / "lock").stat().st_uid == NOBODY
    assert roots.stat().st_uid == 0
    pair.backup.stop()


# Writing at its media only


def test_with_media_a_daemon_writes_there_and_reads_everywhere(pair: Pair) -> None:
    inside, outside = pair.directory / "media", Path(tempfile.mkdtemp(dir="/var/tmp"))
    inside.mkdir()
    try:
        # A directory of its own is made even if nothing can be made beside it later.
        shutil.rmtree(pair.directory / "backup-state")
        for daemon in (pair.backup, pair.primary):
            own = pair.directory / daemon.log.stem
            text = daemon.configuration.read_text()
            for socket_name in ("p.sock", "b.sock", f"{daemon.log.stem}.ctl"):
                text = text.replace(f"{pair.directory}/{socket_name}", f"{own}/{socket_name}")
            daemon.configuration.write_text(text)
            daemon.control = own / daemon.control.name
            configure(daemon, f'media = ["{inside}"]')
        pair.socket = pair.directory / "primary" / "p.sock"
        with pair:
            whole_method(pair, inside / "b")
            cut = pair.snapshot()
            words = ("bundle", "create", f"{VOLUME}@{cut}", "--to", outside / "b")
            assert NO_PERMISSION in pair.backup.verb(*words, expect=1).stderr
            assert not list(outside.iterdir())
            shutil.move(inside / "b", outside / "b")
            pair.primary.verb("merge", outside / "b", VOLUME, expect=None)
            pair.primary.verb("verify", VOLUME)
            for daemon in (pair.primary, pair.backup):
                daemon.stop()
                assert not daemon.control.exists()
    finally:
        shutil.rmtree(outside)


def test_media_that_are_no_directories_are_refused(pair: Pair) -> None:
    for wrong, says in (('["/nowhere/media"]', "/nowhere/media"), ('["media"]', "absolute")):
        text = pair.backup.configuration.read_text()
        configure(pair.backup, f"media = {wrong}")
        pair.backup.launch()
        assert pair.backup.process is not None
        assert pair.backup.process.wait(60) == 2
        assert says in pair.backup.words()
        pair.backup.configuration.write_text(text)


# As the unit runs it

PERMITTED, REFUSED = 0x7FFF0000, 0x00050000 | 1
EQUAL = 4
SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}


class Comparison(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_uint),
        ("value", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


def calls_of(names: list[str]) -> set[str]:
    """System calls by name, groups of systemd's written out."""
    found: set[str] = set()
    for name in names:
        if not name.startswith("@"):
            found.add(name)
            continue
        listed = run(["systemd-analyze", "--no-pager", "syscall-filter", name]).stdout
        inside = re.findall(r"^ +([@a-z0-9_-]+)$", listed, re.MULTILINE)
        assert inside, listed
        found |= calls_of(inside)
    return found


def confinement_of(text: str) -> Callable[[], None]:
    """What puts the unit's system calls, address families and memory rule upon who calls it."""
    allowed: set[str] = set()
    for line in re.findall(r"^SystemCallFilter=(.*)$", text, re.MULTILINE):
        names = line.lstrip("~").split()
        allowed = allowed - calls_of(names) if line.startswith("~") else allowed | calls_of(names)
    # systemd always allows what it needs itself to start a program.
    allowed |= calls_of(["@default"]) | {"execve"}
    [families] = re.findall(r"^RestrictAddressFamilies=(.*)$", text, re.MULTILINE)
    assert "MemoryDenyWriteExecute=yes" in text
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    numbers = [
        library.seccomp_syscall_resolve_name(name.encode()) for name in sorted(allowed - {"socket"})
    ]
    sockets = library.seccomp_syscall_resolve_name(b"socket")

    def begin() -> None:
        assert ctypes.CDLL(None).prctl(SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) == 0
        rules = ctypes.c_void_p(library.seccomp_init(REFUSED))
        for number in numbers:
            if number >= 0:
                library.seccomp_rule_add(rules, PERMITTED, number, 0)
        for family in families.split():
            comparison = Comparison(0, EQUAL, FAMILIES[family], 0)
            added = library.seccomp_rule_add_array(
                rules, PERMITTED, sockets, 1, ctypes.byref(comparison)
            )
            assert added == 0
        assert library.seccomp_load(rules) == 0

    return begin


@pytest.mark.root
def test_under_the_units_user_and_system_calls_the_whole_method_works(
    pair: Pair, readable: list[str]
) -> None:
    begin = confinement_of(unit(read_configuration(starter("primary")), Path("/x"), Path("/y")))
    told = pair.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(told))
        systemd.settimeout(60)
        for path in (pair.directory, *pair.directory.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        environment = {"NOTIFY_SOCKET": str(told), "PATH": os.environ["PATH"]}
        for daemon in (pair.backup, pair.primary):
            launch(
                daemon, readable, preexec_fn=begin, env=environment, umask=0o077,
                user=NOBODY, group=NOBODY, extra_groups=[],
            )  # fmt: skip
            assert b"READY=1" in systemd.recv(4096)
            assert identity_of(daemon)["CapEff"] == {"0" * 16}
        medium = pair.directory / "medium"
        whole_method(pair, medium)
        pair.primary.stop()
        pair.backup.stop()
        assert b"STOPPING=1" in systemd.recv(4096)
    assert "Traceback" not in pair.primary.words() + pair.backup.words()


@pytest.mark.root
def test_a_package_that_the_user_may_not_read_is_refused(pair: Pair, readable: list[str]) -> None:
    configure(pair.backup, 'user = "nobody"')
    top = Path(readable[1].partition("=")[2]).parent
    top.chmod(0o700)
    with pair.backup.log.open("ab") as log:
        command: list[str | Path] = [*readable, "serve", "-c", pair.backup.configuration]
        done = subprocess.run(command, check=False, stdout=log, stderr=log, timeout=60)
    assert done.returncode == 2
    assert "where nobody may read them" in pair.backup.words()
    assert not pair.mirror_device.exists()
