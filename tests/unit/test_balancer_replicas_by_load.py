"""Replicas that views begin with and keep, by the load of experts."""

from __future__ import annotations

import pytest

from support.balancer_parts import config
from support.balancer_world import World
from support.online_world import HALF_LIFE, traffic, world


@pytest.mark.parametrize(("mode", "replicas"), [("online", 2), ("static", 1)])
def test_a_view_starts_from_replicas_by_load_where_traffic_decides(mode: str, replicas: int) -> None:
    settings = config(mode=mode, stats_half_life_tokens=HALF_LIFE)
    settings = settings.model_copy(update={"expert": settings.expert.model_copy(update={"num_slots": 10})})
    w = World(settings)
    w.form("a1", "e1", "e2")
    assert [w.slots(0).count(expert) for expert in (0, 1, 5)] == [2, 2, 1], "no traffic yet"
    traffic(w, [1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0], layers=(0,))
    w.join("e3")
    w.advance(1)
    assert w.view.number == 2
    assert w.slots(0).count(5) == replicas
    assert w.slots(2).count(5) == 1, "nothing is known of this layer"
    assert sum(expert >= 0 for expert in w.slots(0)) == 10


def test_too_few_tokens_make_no_replicas_by_load() -> None:
    settings = config(mode="online", stats_half_life_tokens=HALF_LIFE)
    settings = settings.model_copy(update={"expert": settings.expert.model_copy(update={"num_slots": 10})})
    w = World(settings)
    w.form("a1", "e1", "e2")
    traffic(w, [1.0, 1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0], tokens=200)
    w.join("e3")
    w.advance(1)
    assert w.slots(0).count(5) == 1


def test_replicas_that_the_loop_added_outlive_a_view() -> None:
    w = world()
    w.apply(0, [0, 1, 2, 3, 4, -1, -1, -1, 4, 5, 6, 7, 0, -1, -1, -1])
    w.advance(1)
    traffic(w, [3.0, 1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0])
    before = w.slots(0)
    assert sum(expert >= 0 for expert in before) == 10
    w.join("a2")
    w.join("e3")
    w.advance(1)
    assert sum(expert >= 0 for expert in w.slots(0)) == 10
    assert sum(expert >= 0 for expert in w.slots(2)) == 8
