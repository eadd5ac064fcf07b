"""A balancer in mode online without processes, and traffic for its statistics."""

from __future__ import annotations

from typing import Any

from support.balancer_parts import config
from support.balancer_world import World

HALF_LIFE = 1000
EVEN = [1.0] * 8
SKEWED = [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
"""Experts 0 and 1 are both on the first server."""
VERY_SKEWED = [9.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def world(**balancer: Any) -> World:
    settings = {"mode": "online", "stats_half_life_tokens": HALF_LIFE, "migration_timeout_s": 10, **balancer}
    made = World(config(**settings))
    made.form("a1", "e1", "e2")
    return made


def traffic(
    w: World, load_E: list[float], windows: int = 1, tokens: float = 2000, layers: tuple[int, ...] = (0, 2)
) -> None:
    for _ in range(windows):
        for layer in layers:
            w.statistics.count(layer, load_E, tokens)
        w.advance(1)


def loads(w: World) -> int:
    return sum(len(plan.transfers) for plan in w.heard("a1", "plan"))
