"""A token bucket that may owe: what is taken may be known only afterwards."""

from __future__ import annotations

from collections.abc import Callable


class TokenBucket:
    """Fills at ``per_s`` up to ``capacity``, and begins full.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, per_s: float, capacity: float, clock: Callable[[], float]) -> None:
        self._per_s = per_s
        self._capacity = capacity
        self._clock = clock
        self._level = capacity
        self._at_s = clock()

    def wait_s(self, amount: float) -> float:
        """Seconds until the level is at ``amount``; 0 = it is."""
        self._fill()
        return max(0.0, amount - self._level) / self._per_s

    def take(self, amount: float) -> None:
        """Without asking: the level may fall below zero, and who asks then waits for it."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(self._capacity, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
