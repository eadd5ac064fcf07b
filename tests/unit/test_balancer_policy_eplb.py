"""EPLB as the balancer's policy: the published algorithm, placements that a mesh takes, and the loop that carries them
out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.evaluation import eplb_policy
from expertmesh.balancer.placement_rules import check_experts
from expertmesh.balancer.placement_static import place_layer
from expertmesh.balancer.policy import LayerStatistics, Layout
from expertmesh.balancer.policy_eplb import EplbPolicy, eplb_table, part_replicas
from expertmesh.balancer.solver import Topology, eplb_global
from expertmesh.balancer.solver.expected import balancedness, rank_loads
from expertmesh.balancer.transfers import plan_transfers
from expertmesh.mesh.config import parse_config
from expertmesh.v1 import mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

pytestmark = pytest.mark.slow  # the first run compiles

SKEWED = [4.0, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
"""Experts 0 and 1 are both on the first server."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerStatistics, Layout, list[int]]:
    num_experts, num_ranks = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    capacities = [draw(st.integers(-(-num_experts // num_ranks), num_experts + 3)) for _ in range(num_ranks)]
    if draw(st.booleans()):
        capacities = [max(capacities)] * num_ranks
    table_RS = place_layer(num_experts, draw(st.integers(num_experts, num_experts * num_ranks)), capacities)
    layout = Layout(
        width=max(capacities),
        room_R=tuple(capacities),
        node_R=tuple(draw(st.lists(st.sampled_from("mn"), min_size=num_ranks, max_size=num_ranks))),
        server_R=tuple(f"e{rank}" for rank in range(num_ranks)),
    )
    load_E = np.random.default_rng(draw(st.integers(0, 99))).gamma(0.5, 100, num_experts)
    counts = LayerStatistics(tokens=float(load_E.sum() / 2), load_E=load_E, coactivation_EE=None)
    return counts, layout, table_RS.ravel().tolist()


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_a_proposal_is_a_placement_that_a_mesh_takes(case: Any, all_room: bool) -> None:
    counts, layout, current = case
    filled = [expert >= 0 for expert in current]
    policy = EplbPolicy(max_filled=None if all_room else sum(filled))
    proposal = policy.propose(counts, layout, current, None)
    servers = [server for server in layout.server_R for _ in range(layout.width)]
    check_experts(mesh_pb2.LayerPlacement(slots=proposal.slots), servers, len(counts.load_E))
    assert all(expert >= 0 for expert, was in zip(proposal.slots, filled, strict=True) if was)
    assert all_room or [expert >= 0 for expert in proposal.slots] == filled
    assert len(plan_transfers(current, proposal.slots, layout)) == proposal.num_loads
    assert policy.propose(counts, layout, current, None) == proposal
    assert proposal.after.balancedness >= 0


def test_one_node_gets_eplbs_own_placement() -> None:
    load_E = np.random.default_rng(3).gamma(4.0, 100, 32)
    topology = Topology.even(num_slots=40, num_ranks=8)
    published = eplb_global(load_E[None], 40, 8)[0].reshape(8, 5)
    assert all(len(set(experts)) == 5 for experts in published.tolist()), "nothing to part in this one"
    assert np.array_equal(eplb_table(load_E, topology), published)


def test_several_nodes_get_groups_of_experts() -> None:
    """Hierarchical: no expert is on two nodes, in whatever order the nodes' ranks come."""
    load_E = np.random.default_rng(4).gamma(1.0, 100, 32)
    topology = Topology(slots_of_rank=(5,) * 8, node_of_rank=(0, 1, 0, 1, 0, 1, 0, 1))
    table_RC = eplb_table(load_E, topology)
    on_node = [set(table_RC[topology.node_R == node].ravel().tolist()) for node in range(2)]
    assert on_node[0].isdisjoint(on_node[1])
    assert [len(experts) for experts in on_node] == [16, 16]


def test_two_replicas_on_a_rank_are_parted_at_little_cost() -> None:
    table_RC = np.array([[0, 0, 2], [1, 3, 4]], np.int32)
    load_E = np.array([10.0, 4.0, 1.0, 2.0, 2.0])
    before = balancedness(rank_loads(table_RC, load_E))
    part_replicas(table_RC, load_E, np.zeros(2, np.int32))
    assert table_RC.tolist() == [[0, 1, 2], [0, 3, 4]]
    assert balancedness(rank_loads(table_RC, load_E)) > before
    everywhere_RC = np.array([[0, 0], [0, 1]], np.int32)
    part_replicas(everywhere_RC, np.array([9.0, 1.0]), np.zeros(2, np.int32))
    assert everywhere_RC.tolist() == [[0, 1], [0, 1]], "no rank is left for a third replica"


@pytest.mark.parametrize("load", [[1.0, np.nan], [1.0, -1.0]])
def test_loads_that_are_none_are_refused(load: list[float]) -> None:
    with pytest.raises(ValueError, match="finite number"):
        eplb_table(np.array(load), Topology.even(num_slots=2, num_ranks=2))
    with pytest.raises(ValueError, match="2 usable slots a layer for 3 experts"):
        eplb_table(np.ones(3), Topology.even(num_slots=2, num_ranks=2))


# Through the loop.


def world(nodes: tuple[str, str] = ("n0", "n0"), **balancer: Any) -> World:
    made = World(config(mode="online", policy="eplb", stats_half_life_tokens=1000, **balancer))
    made.policy = eplb_policy(8)  # type: ignore[assignment]  # the world's own policy is another one
    made.join("a1")
    for server_id, node in zip(("e1", "e2"), nodes, strict=True):
        made.join(server_id, node=node)
    made.advance(1.0)
    return made


def traffic(w: World, load_E: list[float], windows: int) -> None:
    for _ in range(windows):
        for layer in (0, 2):
            w.statistics.count(layer, load_E, 4000)
        w.advance(1)


@pytest.mark.parametrize("nodes", [("n0", "n0"), ("n0", "n1")])
def test_skewed_traffic_is_placed_afresh_then_all_is_quiet(nodes: tuple[str, str]) -> None:
    w = world(nodes)
    traffic(w, SKEWED, 2)
    assert w.versions() == {0: 2, 2: 2}
    assert w.agree()
    assert {w.slots(0).index(expert) // w.view.slots_per_rank for expert in (0, 1)} == {0, 1}
    assert "balancedness 0.700 → 1.000" in w.messages("migration_planned")[0]
    traffic(w, SKEWED, 10)
    assert w.versions() == {0: 2, 2: 2}, "hysteresis: the same traffic moves nothing more"


def test_a_re_solve_is_not_bound_by_the_budget_of_slots() -> None:
    w = world(max_slots_per_update=1)
    traffic(w, SKEWED, 2)
    assert w.versions() == {0: 2, 2: 2}
    assert min(len(plan.transfers) for plan in w.heard("a1", "plan")) > 1


def test_noise_moves_nothing() -> None:
    w = world()
    for layer in (0, 2):
        w.statistics.count(layer, [1.1, 1.1, 1, 1, 1, 1, 1, 1], 400)
    w.advance(1)
    assert w.versions() == {0: 1, 2: 1}


def test_the_policy_is_a_key_of_the_configuration() -> None:
    assert parse_config({}).balancer.policy == "solver"
    assert parse_config({"balancer": {"policy": "eplb"}}).balancer.policy == "eplb"
    with pytest.raises(ValueError, match=r"balancer\.policy"):
        parse_config({"balancer": {"policy": "best"}})
