"""What every end-to-end test starts from."""

from __future__ import annotations

import os
import random
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.harness import MIB, Pair

if TYPE_CHECKING:
    from collections.abc import Iterator


def pytest_configure() -> None:
    """SIGTERM ends a run as Ctrl-C does: everything that was started is taken apart."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


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
