"""The systemd unit that `init --systemd` prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from dualrestore.cli import run
from dualrestore.cli.commands.init import starter
from dualrestore.cli.unit import unit
from dualrestore.config import read_configuration
from dualrestore.errors import UsageError

PROGRAM = Path(sys.executable).parent / "dualrestore"
FILE = Path("/etc/dualrestore/node.toml")

WHOLE = """
[node]
state = "/var/lib/dr/one"
control = "/run/dr/control.sock"
listen = "0.0.0.0:810"
tls = "/etc/dualrestore/pki"
[volume.a]
role = "backup"
device = "/dev/disk/by-id/ata-WD 50%"
export = ["unix:/run/dr/a.sock", "unix:/srv/nbd/a.sock"]
[volume.b]
role = "backup"
device = "/srv/images/b.img"
size = "1GiB"
"""


def settings(text: str) -> dict[str, list[str]]:
    """Every setting with its values, in order."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def analyze(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """systemd's own word on a unit file."""
    command = ["systemd-analyze", "--no-pager", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture(params=["primary", "backup", "whole"])
def written(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The unit of a configuration, as a file."""
    text = WHOLE if request.param == "whole" else starter(request.param)
    path = tmp_path / "dualrestore.service"
    path.write_text(unit(read_configuration(text), FILE, PROGRAM))
    return path


def test_systemd_counts_an_exposure_of_two_at_most(written: Path) -> None:
    done = analyze("security", "--offline=true", "--threshold=20", written)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


def test_systemd_finds_no_fault_in_it(written: Path) -> None:
    done = analyze("verify", "--man=no", written)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_open_unit_would_be_noticed(tmp_path: Path) -> None:
    path = tmp_path / "open.service"
    path.write_text(f"[Service]\nExecStart={PROGRAM} serve\n")
    assert analyze("security", "--offline=true", "--threshold=20", path).returncode != 0
    path.write_text("[Service]\nExecStart=/nowhere/dualrestore serve\nProtectHoem=yes\n")
    assert "ProtectHoem" in analyze("verify", "--man=no", path).stderr


def test_it_names_devices_directories_and_ports_of_its_configuration_and_no_others() -> None:
    found = settings(unit(read_configuration(WHOLE), FILE, PROGRAM))
    assert found["ExecStart"] == [f"{PROGRAM} serve -c {FILE}"]
    assert (found["StateDirectory"], found["RuntimeDirectory"]) == (["dr/one"], ["dr"])
    assert found["DeviceAllow"] == ['"/dev/disk/by-id/ata-WD 50%%" rw']
    assert found["ReadWritePaths"] == ["/srv/images /srv/nbd", "-/media -/mnt -/run/media"]
    assert found["CapabilityBoundingSet"] == ["CAP_NET_BIND_SERVICE"]
    assert found["SupplementaryGroups"] == ["disk"]


def test_without_disks_and_low_ports_it_asks_for_no_group_and_no_capability() -> None:
    text = WHOLE.replace("/dev/disk/by-id/ata-WD 50%", "/srv/a.img").replace(":810", ":10810")
    found = settings(unit(read_configuration(text + 'export = ["tcp:[::1]:10809"]'), FILE, PROGRAM))
    assert "SupplementaryGroups" not in found
    assert "DeviceAllow" not in found
    assert (found["CapabilityBoundingSet"], found["AmbientCapabilities"]) == ([""], [""])


def test_a_socket_where_only_root_may_make_one_is_refused() -> None:
    text = WHOLE.replace("/run/dr/control.sock", "/run/control.sock")
    with pytest.raises(UsageError, match=r"/run/dualrestore/control\.sock"):
        unit(read_configuration(text), FILE, PROGRAM)


def test_init_prints_it_or_writes_a_new_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "node.toml", tmp_path / "x.service"
    file.write_text(starter("backup"))
    assert run(["-c", str(file), "init", "--systemd"]) == 0
    printed = capsys.readouterr().out
    assert f"serve -c {file}\n" in printed
    assert run(["init", "--systemd", "-c", str(file), str(out)]) == 0
    assert out.read_text() == printed
    assert run(["init", "--systemd", "-c", str(file), str(out)]) == 2
    assert run(["init", "--systemd", "-c", str(file), "/nowhere/x.service"]) == 1
    monkeypatch.delenv("DUALRESTORE_CONFIG", raising=False)
    assert run(["init", "--systemd"]) == 2
    assert "-c FILE" in capsys.readouterr().err
