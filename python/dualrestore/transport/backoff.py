"""How long to wait before trying again: doubling, capped, with jitter.

Guarantees: many clients that lost the same server do not come back at the same instant; a delay is
never above its cap. Randomness is given, so that tests can choose it.
"""

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds: `first`, twice that, ... up to `most`, each times 0.5 to 1."""

    def __init__(
        self,
        first: float,
        most: float,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first = first
        self._most = most
        self._chance = chance
        self._next = first

    def delay(self) -> float:
        """The next delay."""
        whole = self._next
        self._next = min(whole * 2, self._most)
        return whole * (0.5 + self._chance() / 2)

    def reset(self) -> None:
        """It worked: begin small again."""
        self._next = self._first
