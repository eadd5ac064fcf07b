"""How much noisier routing counts are than those of independent tokens. Pure.

Tokens of one request choose alike, so counts vary more than their number says. What the variance is shows between
windows of the same traffic; a change of the traffic in between must not pass for noise, so each window is compared
with the one before it, and the median counts.
"""

from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

from expertmesh.balancer.policy import Floats, LayerStatistics

UNKNOWN = 4.0
"""Assumed until enough windows were seen: what prompts of a hundred tokens gave on the demo model."""
FEWEST_PAIRS = 2
PAIRS_KEPT = 8
DRIFT = 2.0
"""Times the variance that windows of the same traffic show, from which on traffic counts as another one."""


class Dispersion:
    """Variance over mean of one layer's counts. ``observe`` it at every snapshot; windows lie between snapshots."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seen = 0.0
        self._load_E: Floats | None = None
        self._window_E: Floats | None = None
        self._ratios: deque[float] = deque(maxlen=PAIRS_KEPT)

    @property
    def value(self) -> float:
        """At least 1."""
        return max(1.0, median(self._ratios)) if len(self._ratios) >= FEWEST_PAIRS else UNKNOWN

    def observe(self, snapshot: LayerStatistics, seen: float) -> None:
        """
        Args:
            seen: tokens without decay at the time of the snapshot.
        """
        if self._load_E is not None and self._tokens > 0:
            fresh = seen - self._seen
            kept = max(snapshot.tokens - fresh, 0.0) / self._tokens
            window_E = np.maximum(snapshot.load_E - kept * self._load_E, 0.0)
            if self._window_E is not None:
                self._compare(self._window_E, window_E)
            self._window_E = window_E
        self._tokens, self._seen, self._load_E = snapshot.tokens, seen, snapshot.load_E

    def _compare(self, before_E: Floats, after_E: Floats) -> None:
        ratio = _unlikeness(before_E, after_E)
        if ratio is not None:
            self._ratios.append(ratio)


def has_drifted(before: LayerStatistics, now: LayerStatistics, fresh: float, dispersion: float) -> bool:
    """Whether the tokens that came in between chose otherwise than those before, by more than chance.

    Args:
        before, now: snapshots of the same decayed counts.
        fresh: tokens that came in between.
        dispersion: of windows of the same traffic.
    """
    kept = max(now.tokens - fresh, 0.0) / max(before.tokens, 1.0)
    ratio = _unlikeness(before.load_E, np.maximum(now.load_E - kept * before.load_E, 0.0))
    return ratio is not None and ratio > DRIFT * dispersion


def _unlikeness(before_E: Floats, after_E: Floats) -> float | None:
    """The median over experts of the chi-square statistic of two windows, over its own median (0.455 at one degree of
    freedom: the median of squares is less than their mean). None where a window is empty."""
    total_E = before_E + after_E
    known_E = total_E > 0
    if not before_E.any() or not after_E.any():
        return None
    share = before_E.sum() / total_E.sum()
    excess_E = (before_E - share * total_E)[known_E] ** 2 / (share * (1 - share) * total_E[known_E])
    return float(np.median(excess_E)) / 0.455
