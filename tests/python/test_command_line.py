"""What a user sees: words, codes, no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dualrestore.cli import _VERBS, run


def test_every_verb_has_help_with_an_example_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in _VERBS:
        assert run([verb, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Example:" in text, verb
        assert "--json" in text or "COMMAND" in text, verb


@pytest.mark.parametrize(
    ("group", "verb"),
    [
        ("bundle", "create"),
        ("bundle", "verify"),
        ("bundle", "show"),
        ("map", "create"),
        ("map", "mark"),
        ("map", "show"),
        ("map", "export"),
        ("map", "picture"),
    ],
)
def test_every_second_verb_has_help_with_an_example_and_json(
    group: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([group, verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example:" in text
    assert "--json" in text


def test_an_unknown_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["restor"]) == 2
    assert "Did you mean 'restore'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["restore", "v", "--lost", "all"],
        ["restore", "v", "--lost", "all", "0-1MiB"],
        ["restore", "v", "--lost", "1MiB-0"],
        ["merge", "only-one"],
        ["merge", "bundle", "./target.img"],
        ["map", "create", "x.map"],
        ["map", "create", "x.map", "--size", "1MB"],
        ["demo", "--size", "1MiB"],
        ["demo", "--link-rate", "fast"],
        ["bundle", "create", "/nonexistent/image", "--to", "/nonexistent/out"],
        ["snapshot", "v", "--list", "--delete", "x", "-c", "/nonexistent"],
    ],
)
def test_wrong_words_are_exit_code_2_and_no_traceback(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUALRESTORE_CONFIG", raising=False)
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rror" in captured.err
    assert "Traceback" not in captured.err


def test_with_json_an_error_is_one_document_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUALRESTORE_CONFIG", raising=False)
    assert run(["status", "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["exit_code"] == 2
    assert error["kind"] == "UsageError"
    assert run(["status", "--json", "--nonsense"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["exit_code"] == 2


def test_a_traceback_is_shown_only_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALRESTORE_DEBUG", "1")
    assert run(["-c", "/nonexistent", "status"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_daemon_that_is_not_there_is_exit_code_7(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(f'[node]\nstate = "{tmp_path}"\ncontrol = "{tmp_path}/c.sock"\n')
    assert run(["status", "-c", str(path)]) == 7
    assert "dualrestore serve" in capsys.readouterr().err


def test_the_configuration_may_stand_before_or_after_the_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["-c", "/nonexistent/a", "status"]) == 2
    assert "/nonexistent/a" in capsys.readouterr().err
    assert run(["-c", "/nonexistent/a", "status", "-c", "/nonexistent/b"]) == 2
    assert "/nonexistent/b" in capsys.readouterr().err


def test_init_never_replaces_a_file_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.toml"
    assert run(["init", str(path)]) == 0
    before = path.read_text()
    assert run(["init", str(path), "--role", "backup"]) == 2
    assert path.read_text() == before
    assert run(["init", str(path), "--role", "backup", "--force"]) == 0
    assert path.read_text() != before
    capsys.readouterr()


def test_completion_is_printed_for_each_shell(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in ("bash", "zsh", "fish"):
        assert run(["completion", shell]) == 0
        assert "_DUALRESTORE_COMPLETE" in capsys.readouterr().out


def _modules_after(words: str) -> set[str]:
    code = (
        f"import sys\nfrom dualrestore.cli import run\nrun({words})\nprint('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    return set(done.stdout.split())


def test_the_version_loads_click_and_little_else() -> None:
    loaded = _modules_after("['--version']")
    heavy = {"numpy", "rich", "msgspec", "starlette", "uvicorn", "asyncio", "dualrestore._core"}
    assert not loaded & heavy


def test_files_are_compared_block_by_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    content = bytearray(os.urandom(1 << 20))
    one.write_bytes(content)
    two.write_bytes(content)
    assert run(["verify", str(one), str(two)]) == 0
    content[8191] ^= 1
    content[8192] ^= 1
    two.write_bytes(content)
    capsys.readouterr()
    assert run(["verify", str(one), str(two), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert report["different"] == [[4096, 8192]]
    assert report["same"] is False
    two.write_bytes(content[:-512])
    assert run(["verify", str(one), str(two)]) == 2


def test_a_file_that_may_not_grow_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 << 20))
    command = ["prlimit", "--fsize=1048576", sys.executable, "-m", "dualrestore"]
    done = subprocess.run(
        [*command, "bundle", "create", str(image), "--to", str(tmp_path / "b")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done
    assert "File too large" in done.stderr
