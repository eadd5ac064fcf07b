"""Replicas that the configuration asks for: placements have them as far as there is room, and get them back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.placement_static import place_layer, usable_slots
from expertmesh.balancer.policy import LayerStatistics, Layout, PlacementPolicy
from expertmesh.balancer.policy_eplb import EplbPolicy
from expertmesh.balancer.policy_solver import SolverPolicy
from expertmesh.balancer.replicas import ReplicaRule, hold, restore
from expertmesh.balancer.solver import SolverOptions
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.errors import UserError
from support.balancer_parts import registration
from support.balancer_world import World


@st.composite
def meshes(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Experts of a layer and the room of each rank, enough for one replica of each."""
    num_experts = draw(st.integers(2, 12))
    capacities = draw(st.lists(st.integers(1, 14), min_size=2, max_size=5))
    if usable_slots(num_experts, capacities) < num_experts:
        capacities.append(num_experts)
    return num_experts, capacities


rules = st.builds(ReplicaRule, min_replicas=st.integers(1, 4), num_hot=st.integers(0, 12))


def replicas(table_RS: np.ndarray, num_experts: int) -> np.ndarray:
    """Of each expert; no rank holds two."""
    held_RE = hold(table_RS, len(table_RS), num_experts)
    assert held_RE.sum() == (table_RS >= 0).sum(), "two replicas of an expert on one rank"
    counts_E: np.ndarray = held_RE.sum(axis=0)
    return counts_E


def check_kept(rule: ReplicaRule, replicas_E: np.ndarray, load_E: np.ndarray | None, usable: int, ranks: int) -> None:
    """Said without the algorithm: as many replicas as there is room for, and the hottest experts come first."""
    num_experts = len(replicas_E)
    if num_experts * rule.min_replicas <= usable and rule.min_replicas <= ranks:
        assert replicas_E.min() >= rule.min_replicas
    spare = usable - num_experts
    num_hot = 0 if load_E is None or ranks < 2 else min(rule.num_hot, num_experts, spare)
    assert (replicas_E > 1).sum() >= num_hot
    if rule.min_replicas > 1 and ranks > 1:
        assert (replicas_E > 1).sum() >= min(num_experts, spare)


@given(meshes(), rules, st.data())
def test_static_placements_have_the_replicas_that_there_is_room_for(
    mesh: tuple[int, list[int]], rule: ReplicaRule, data: st.DataObject
) -> None:
    num_experts, capacities = mesh
    usable = usable_slots(num_experts, capacities)
    num_slots = max(num_experts, min(usable, num_experts * rule.min_replicas + rule.num_hot))
    load_E = np.random.default_rng(num_slots).gamma(0.5, 10, num_experts)
    fresh_RS = place_layer(num_experts, num_experts * rule.min_replicas, capacities, rule=rule)
    check_kept(
        ReplicaRule(min_replicas=rule.min_replicas), replicas(fresh_RS, num_experts), None, usable, len(capacities)
    )
    kept = data.draw(st.lists(st.booleans(), min_size=len(capacities), max_size=len(capacities)))
    current_RS = np.where(np.array(kept)[:, None], fresh_RS, -1)  # the others are replaced by new servers
    for known in (load_E, None):
        table_RS = place_layer(num_experts, num_slots, capacities, current_RS, known, rule)
        counted = known if (current_RS >= 0).any() else None
        check_kept(rule, replicas(table_RS, num_experts), counted, min(usable, num_slots), len(capacities))


@given(meshes(), rules, st.integers(0, 2**16), st.integers(1, 5))
def test_what_is_missing_comes_back_piece_by_piece(
    mesh: tuple[int, list[int]], rule: ReplicaRule, seed: int, max_loads: int
) -> None:
    num_experts, capacities = mesh
    usable, num_ranks = usable_slots(num_experts, capacities), len(capacities)
    rng = np.random.default_rng(seed)
    load_E = rng.gamma(0.5, 10, num_experts)
    table_RS = place_layer(num_experts, int(rng.integers(num_experts, usable + 1)), capacities)
    floor_E = rule.floors(replicas(table_RS, num_experts), load_E, usable, num_ranks)
    assert floor_E.sum() <= usable
    for _ in range(2 * usable):
        before_E = replicas(table_RS, num_experts)
        if (before_E >= floor_E).all():
            break
        grown_RS = restore(table_RS, capacities, floor_E, max_loads)
        after_E = replicas(grown_RS, num_experts)
        shortfall = np.maximum(floor_E - after_E, 0).sum()
        assert shortfall < np.maximum(floor_E - before_E, 0).sum()
        assert after_E.min() >= 1
        came = hold(grown_RS, num_ranks, num_experts) & ~hold(table_RS, num_ranks, num_experts)
        assert came.sum() <= max_loads or (np.maximum(floor_E - before_E, 0).sum() - shortfall) == 1
        assert all((row[room:] < 0).all() for row, room in zip(grown_RS, capacities, strict=True))
        table_RS = grown_RS
    check_kept(rule, replicas(table_RS, num_experts), load_E, usable, num_ranks)


def test_equally_hot_experts_do_not_take_turns() -> None:
    rule, held_E = ReplicaRule(num_hot=1), np.array([2, 1, 1])
    assert rule.floors(held_E, np.array([10.0, 12.0, 1.0]), 4, 2).tolist() == [2, 1, 1]
    assert rule.floors(held_E, np.array([10.0, 13.0, 1.0]), 4, 2).tolist() == [1, 2, 1]


@pytest.mark.parametrize("kind", [partial(SolverPolicy, SolverOptions(proposals=500)), EplbPolicy])
@settings(max_examples=40)
@given(mesh=meshes(), rule=rules, seed=st.integers(0, 2**16), max_loads=st.sampled_from([2, None]))
def test_policies_keep_the_replicas(
    kind: Callable[..., PlacementPolicy],
    mesh: tuple[int, list[int]],
    rule: ReplicaRule,
    seed: int,
    max_loads: int | None,
) -> None:
    num_experts, capacities = mesh
    rng, usable = np.random.default_rng(seed), usable_slots(num_experts, capacities)
    load_E = rng.gamma(0.3, 1000, num_experts) + 1
    pairs_EE = np.outer(load_E, load_E) / load_E.sum()
    statistics = LayerStatistics(tokens=float(load_E.sum()), load_E=load_E, coactivation_EE=pairs_EE)
    start_RS = place_layer(num_experts, num_experts, capacities)
    floor_E = rule.floors(replicas(start_RS, num_experts), load_E, usable, len(capacities))
    current_RS = restore(start_RS, capacities, floor_E)
    names = tuple(map(str, range(len(capacities))))
    layout = Layout(width=current_RS.shape[1], room_R=tuple(capacities), node_R=names, server_R=names)
    proposal = kind(rule=rule).propose(statistics, layout, tuple(current_RS.ravel().tolist()), max_loads)
    planned_RS = np.array(proposal.slots, np.int32).reshape(current_RS.shape)
    kept = ReplicaRule(min_replicas=rule.min_replicas)
    check_kept(kept, replicas(planned_RS, num_experts), load_E, usable, len(capacities))
    assert (replicas(planned_RS, num_experts) >= floor_E).sum() >= min(rule.num_hot, num_experts, usable - num_experts)


def config(experts: int = 3, **expert: Any) -> MeshConfig:
    return parse_config(
        {
            "attention": {"servers": 1},
            "expert": {"servers": experts, **expert},
            "balancer": {"mode": "static", "max_slots_per_update": 3},
        }
    )


def least(world: World) -> int:
    tables = [np.array(placement.slots, np.int32) for placement in world.view.placement]
    return min(int(np.bincount(table[table >= 0], minlength=8).min()) for table in tables)


def test_a_lost_server_costs_no_load_in_the_view_and_its_replicas_come_back_while_it_serves() -> None:
    world = World(config(min_replicas=2))
    world.form("a1", "e1", "e2", "e3")
    assert least(world) == 2
    held = world.experts()
    world.disconnect("e3")
    world.report_broken("a1", "e3")
    world.advance(0.2, step_s=0.05)
    assert (world.view.number, world.ranks) == (2, ["a1", "e1", "e2"])
    first = np.array(world.heard("a1", "view")[-1].placement[0].slots, np.int32).reshape(2, -1)
    assert [set(row[row >= 0].tolist()) for row in first] == [held["e1"], held["e2"]], "nothing was loaded for the view"
    world.advance(5)
    assert (world.phase, least(world)) == (Phase.SERVING, 2)
    assert "migration_committed" in world.kinds()
    assert world.view.number == 2
    assert world.agree()
    assert "replicas_short" not in world.kinds()


def test_too_little_room_is_said_once_and_what_fits_is_kept() -> None:
    world = World(config(min_replicas=2))
    world.form("a1", "e1", "e2", "e3")
    for server_id in ("e2", "e3"):
        world.disconnect(server_id)
    world.report_broken("a1", "e2", "e3")
    world.advance(5)
    assert (world.phase, world.ranks, least(world)) == (Phase.SERVING, ["a1", "e1"], 1)
    (said,) = world.messages("replicas_short")
    assert said.startswith("1 expert servers cannot hold 2 replicas of an expert: some experts have fewer until")
    world.join("e4")
    world.advance(5)
    assert (world.phase, least(world)) == (Phase.SERVING, 2)
    assert len(world.messages("replicas_possible")) == 1


def test_room_for_some_goes_to_as_many_experts_as_fit() -> None:
    world = World(config(experts=2, min_replicas=2))
    world.connect(registration("a1"))
    for server_id, room in (("e1", 8), ("e2", 8)):
        made = registration(server_id)
        made.num_slots = room if server_id == "e1" else 5
        world.connect(made)
    world.advance(3)
    counts = np.bincount([e for e in world.view.placement[0].slots if e >= 0], minlength=8)
    assert sorted(counts.tolist()) == [1, 1, 1, 2, 2, 2, 2, 2]
    assert "take 16 slots a layer, there are 13" in world.messages("replicas_short")[0]


def test_a_layer_whose_replicas_cannot_be_loaded_waits_longer_each_time() -> None:
    world = World(config(min_replicas=2))
    world.form("a1", "e1", "e2", "e3")
    world.disconnect("e3")
    world.report_broken("a1", "e3")
    world.hold("e1", broken=True)
    world.advance(40, step_s=0.2)
    assert (world.phase, least(world)) == (Phase.SERVING, 1)
    tries = world.kinds().count("migration_planned")
    assert 2 * 2 <= tries <= 2 * 3, "two layers, and a second try after 30 s"
    world.hold("e1", broken=False)
    world.advance(90, step_s=0.2)
    assert least(world) == 2


def test_hot_experts_get_their_second_replica_in_mode_online() -> None:
    keys = config(experts=2, num_hot_experts=2).model_dump()
    keys["balancer"].update(mode="online", stats_half_life_tokens=1000)
    world = World(parse_config(keys))
    world.form("a1", "e1", "e2")
    assert least(world) == 1
    load_E = [1.0, 9, 1, 1, 8, 1, 1, 1]
    for layer in (0, 2):
        world.statistics.count(layer, load_E, 1000)
    world.advance(10)
    for placement in world.view.placement:
        counts = np.bincount([e for e in placement.slots if e >= 0], minlength=8)
        assert counts[1] == counts[4] == 2


@pytest.mark.parametrize(
    ("expert", "key"),
    [
        ({"min_replicas": 4}, "expert.min_replicas is 4, more than the 3 expert servers"),
        ({"min_replicas": 2, "num_slots": 40}, "expert.num_slots: 40 slots are fewer than the 64"),
        ({"min_replicas": 2, "slots_per_server": 20}, "expert.slots_per_server: 20 slots × 3 servers hold fewer"),
        ({"num_hot_experts": 4, "slots_per_server": 11}, "fewer than the 36 that num_hot_experts = 4 takes"),
        ({"num_hot_experts": 1, "servers": 1}, "expert.num_hot_experts is set, and one expert server"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(expert: dict[str, int], key: str) -> None:
    with pytest.raises(UserError, match=key):
        parse_config({"expert": expert}).slots_per_server(32)


def test_room_for_replicas_survives_a_server() -> None:
    assert parse_config({"expert": {"servers": 4, "min_replicas": 2}}).slots_per_server(32) == 22
    assert parse_config({"expert": {"servers": 3, "num_hot_experts": 4}}).slots_per_server(32) == 18
