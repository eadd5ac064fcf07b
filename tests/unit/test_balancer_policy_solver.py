"""The solver behind the online loop: in the view's numbering, within the slots that are filled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.placement_rules import check_experts
from expertmesh.balancer.placement_static import place_layer
from expertmesh.balancer.policy import LayerStatistics, Layout
from expertmesh.balancer.policy_solver import SolverPolicy
from expertmesh.balancer.transfers import plan_transfers
from expertmesh.v1 import mesh_pb2

pytestmark = pytest.mark.slow  # the first run compiles


@st.composite
def cases(draw: st.DrawFn) -> tuple[LayerStatistics, Layout, list[int]]:
    num_experts, num_ranks = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    capacities = [draw(st.integers(-(-num_experts // num_ranks), num_experts + 3)) for _ in range(num_ranks)]
    num_slots = draw(st.integers(num_experts, num_experts * num_ranks))
    table_RS = place_layer(num_experts, num_slots, capacities)
    layout = Layout(
        width=max(capacities),
        room_R=tuple(capacities),
        node_R=tuple(draw(st.lists(st.sampled_from("mn"), min_size=num_ranks, max_size=num_ranks))),
        server_R=tuple(f"e{rank}" for rank in range(num_ranks)),
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    load_E = rng.gamma(0.5, 100, num_experts)
    pair_EE = np.outer(load_E, load_E) / load_E.sum() * rng.uniform(0, 2, (num_experts, num_experts))
    pair_EE = np.triu(pair_EE, 1) + np.triu(pair_EE, 1).T
    statistics = LayerStatistics(
        tokens=float(load_E.sum() / 2), load_E=load_E, coactivation_EE=draw(st.sampled_from([pair_EE, None]))
    )
    return statistics, layout, table_RS.ravel().tolist()


@settings(max_examples=30)
@given(cases(), st.sampled_from([None, 3]), st.integers(0, 60))
def test_no_more_slots_are_filled_than_may_be(case: Any, max_loads: int | None, max_filled: int) -> None:
    statistics, layout, current = case
    proposal = SolverPolicy(max_filled=max_filled).propose(statistics, layout, current, max_loads)
    filled = sum(expert >= 0 for expert in proposal.slots)
    assert filled <= max(max_filled, sum(expert >= 0 for expert in current))
    for rank, room in enumerate(layout.room_R):
        beyond = proposal.slots[rank * layout.width + room : (rank + 1) * layout.width]
        assert set(beyond) <= {-1}, "a slot that the rank lacks is filled"


@settings(max_examples=30)
@given(cases(), st.sampled_from([None, 0, 1, 3, 8]))
def test_a_proposal_is_a_placement_within_the_budget(case: Any, max_loads: int | None) -> None:
    statistics, layout, current = case
    proposal = SolverPolicy().propose(statistics, layout, current, max_loads)
    servers = [server for server in layout.server_R for _ in range(layout.width)]
    check_experts(mesh_pb2.LayerPlacement(slots=proposal.slots), servers, len(statistics.load_E))
    for now, planned in zip(current, proposal.slots, strict=True):
        assert planned >= 0 or now < 0, "a slot was emptied"
    assert len(plan_transfers(current, proposal.slots, layout)) == proposal.num_loads
    assert max_loads is None or proposal.num_loads <= max_loads
    assert SolverPolicy().propose(statistics, layout, current, max_loads) == proposal
    assert (statistics.coactivation_EE is None) == (proposal.after.fanout_ranks is None)


def test_a_clear_gain_is_worthwhile_and_noise_is_not() -> None:
    layout = Layout(width=8, room_R=(8, 8), node_R=("n", "n"), server_R=("e1", "e2"))
    current = place_layer(8, 8, [8, 8]).ravel().tolist()
    skewed_E = np.array([400.0, 400, 100, 100, 100, 100, 100, 100])
    found = SolverPolicy().propose(
        LayerStatistics(tokens=1400, load_E=skewed_E, coactivation_EE=None), layout, current, 4
    )
    assert found.worthwhile
    assert found.before.balancedness == pytest.approx(0.7)
    assert found.after.balancedness > 0.95
    scarce = LayerStatistics(tokens=14, load_E=skewed_E / 100, coactivation_EE=None)
    assert not SolverPolicy().propose(scarce, layout, current, 4).worthwhile
    even = LayerStatistics(tokens=1400, load_E=np.full(8, 175.0), coactivation_EE=None)
    assert SolverPolicy().propose(even, layout, current, 4).num_loads == 0


def test_an_empty_slot_takes_a_replica_of_a_hot_expert_when_that_pays() -> None:
    layout = Layout(width=5, room_R=(5, 5), node_R=("n", "n"), server_R=("e1", "e2"))
    current = place_layer(8, 8, [5, 5]).ravel().tolist()
    assert current == [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]
    hot_E = np.array([900.0, 100, 100, 100, 100, 100, 100, 100])
    counts = LayerStatistics(tokens=1600, load_E=hot_E, coactivation_EE=None)
    found = SolverPolicy().propose(counts, layout, current, 4)
    assert found.slots.count(0) == 2, "no swap could share out so hot an expert"
    assert found.worthwhile
    assert found.before.balancedness == pytest.approx(800 / 1200)
    assert found.after.balancedness == pytest.approx(1.0)
    assert found.num_loads <= 2
    assert SolverPolicy(max_filled=8).propose(counts, layout, current, 4).slots.count(-1) == 2
    even = LayerStatistics(tokens=1600, load_E=np.full(8, 200.0), coactivation_EE=None)
    assert SolverPolicy().propose(even, layout, current, 4).slots == tuple(current), "nothing to gain"


def test_an_empty_slot_takes_a_replica_that_saves_visits() -> None:
    layout = Layout(width=5, room_R=(5, 5), node_R=("n", "n"), server_R=("e1", "e2"))
    current = [0, 1, 2, 3, -1, 4, 5, 6, 7, -1]
    pairs = [(0, 1), (0, 2), (0, 4), (0, 5), (1, 2), (4, 5), (3, 6), (6, 7), (3, 7)]
    pair_EE = np.zeros((8, 8))
    for e, f in pairs:
        pair_EE[e, f] = pair_EE[f, e] = 300.0
    counts = LayerStatistics(tokens=2700, load_E=pair_EE.sum(axis=1), coactivation_EE=pair_EE)
    found = SolverPolicy().propose(counts, layout, current, 2)
    assert found.slots.count(-1) < 2
    assert found.after.fanout_ranks is not None
    assert found.before.fanout_ranks is not None
    assert found.after.fanout_ranks < found.before.fanout_ranks - 0.05
