"""Shares of ranks for each source of tokens: a placement version that loads nothing."""

from __future__ import annotations

import pytest

from support.balancer_parts import config
from support.balancer_world import World
from support.online_world import EVEN, HALF_LIFE, loads


def two_nodes() -> World:
    """An attention and an expert server on each of two nodes; experts 0 and 1 are on both."""
    w = World(config(attention=2, mode="online", stats_half_life_tokens=HALF_LIFE))
    for number in "12":
        w.join(f"a{number}", f"e{number}", node=f"n{number}")
    w.advance(1)
    w.apply(0, [0, 1, 2, 3, 4, -1, -1, -1, 0, 1, 5, 6, 7, -1, -1, -1])
    w.advance(1)
    return w


def test_quotas_of_sources_are_a_new_version_that_loads_nothing() -> None:
    w = two_nodes()
    version, before = w.versions()[0], w.slots(0)
    moved = loads(w)
    for _ in range(3):
        w.statistics.count(0, EVEN, 8000, sources={"a1": 0.5, "a2": 0.5})
        w.advance(1)
    assert w.versions()[0] == version + 1, "once: they are in force then"
    assert (w.slots(0), loads(w)) == (before, moved)
    assert w.agree()
    quotas = {quota.server_id: list(quota.rank_share) for quota in w.view.placement[0].source_quotas}
    assert quotas["a1"] == pytest.approx(quotas["a2"][::-1])
    assert sum(quotas["a1"]) == pytest.approx(1)
    assert quotas["a1"][0] > 0.55
    w.restart_balancer()
    for server_id in list(w.servers):
        w.rejoin(server_id)
    w.advance(2)
    assert quotas == {quota.server_id: list(quota.rank_share) for quota in w.view.placement[0].source_quotas}
    assert w.versions()[0] == version + 1


def test_quotas_follow_the_sources() -> None:
    w = two_nodes()
    w.statistics.count(0, EVEN, 8000, sources={"a1": 0.5, "a2": 0.5})
    w.advance(1)
    version, first = w.versions()[0], w.view.placement[0].source_quotas[0].rank_share[0]
    w.statistics.count(0, EVEN, 8000, sources={"a1": 0.9, "a2": 0.1})
    w.advance(1)
    assert w.versions()[0] == version + 1
    assert w.view.placement[0].source_quotas[0].rank_share[0] < first, "the other source fills less of its own node"


def test_quotas_end_with_the_set_of_sources() -> None:
    """Those that are left would not be level without those that have gone."""
    w = two_nodes()
    w.statistics.count(0, EVEN, 8000, sources={"a1": 0.5, "a2": 0.5})
    w.advance(1)
    before = w.slots(0)
    assert w.view.placement[0].source_quotas
    w.join("a3")
    w.advance(1)
    assert not w.view.placement[0].source_quotas
    assert w.slots(0) == before
