"""What every end-to-end test starts from."""

from __future__ import annotations

import ctypes
import os
import random
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, Pair, run

if TYPE_CHECKING:
    from collections.abc import Iterator


NEW_MOUNTS = 0x00020000
"""CLONE_NEWNS; Python has it from 3.12 on."""


def pytest_configure() -> None:
    """SIGTERM ends a run as Ctrl-C does: everything that was started is taken apart. What is
    mounted is mounted for this process and its children only, and gone when they are."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() == 0 and ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0:
        run(["mount", "--make-rprivate", "/"])


@pytest.fixture
def seed() -> int:
    """The seed of a random test: shown when it fails, set by DUALRESTORE_SEED to repeat it."""
    chosen = int(os.environ.get("DUALRESTORE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"DUALRESTORE_SEED={chosen}")
    return chosen


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary and a backup of 32 MiB, both running, both created empty."""
    with Pair(32 * MIB) as running:
        yield running
