"""Errors and their exit codes."""

import inspect

import pytest

from dualrestore import errors
from dualrestore.errors import (
    DeviceError,
    DualRestoreError,
    ExitCode,
    error_by_name,
    exit_code_of,
)

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, DualRestoreError)
]


def test_exit_codes_are_those_that_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "DAMAGED_CHUNKS": 3,
        "DIFFERENCES": 4,
        "NOT_OURS": 5,
        "NEXT_MEDIUM": 6,
        "LINK_DOWN": 7,
        "BUSY": 11,
        "INTERRUPTED": 130,
        "TERMINATED": 143,
    }


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_the_way_to_another_process(kind: type[DualRestoreError]) -> None:
    back = error_by_name(kind.__name__, "what was expected", 28)
    assert type(back) is kind
    assert str(back) == "what was expected"
    if isinstance(back, DeviceError):
        assert back.errno == 28


def test_an_unknown_kind_is_a_plain_failure() -> None:
    back = error_by_name("NewerError", "text")
    assert type(back) is DualRestoreError
    assert exit_code_of(back) == ExitCode.FAILED


@pytest.mark.parametrize("kind", ALL)
def test_the_tree_in_the_docstring_names_every_error(kind: type[DualRestoreError]) -> None:
    assert errors.__doc__ is not None
    [line] = [line for line in errors.__doc__.splitlines() if f" {kind.__name__}" in " " + line]
    if kind is not DualRestoreError:
        assert line.rstrip().endswith(f" {int(kind.exit_code)}")


def test_errors_are_what_python_programmers_catch() -> None:
    assert issubclass(errors.DeviceError, OSError)
    assert issubclass(errors.LinkError, ConnectionError)
    assert issubclass(errors.DeadlineError, TimeoutError)
    assert issubclass(errors.UsageError, ValueError)
