"""What every placement of the solver keeps, whatever the loads and the ranks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from expertmesh.balancer.solver import (
    Budget,
    LayerPlan,
    SolverOptions,
    Topology,
    apply_moves,
    count_routing,
    linear,
    solve_layer,
)
from expertmesh.balancer.solver.expected import rank_loads
from support.routing import topic_tokens

OPTIONS = SolverOptions(proposals=300)


class Case(NamedTuple):
    load_E: NDArray[np.float64]
    pair_EE: NDArray[np.float64] | None
    topology: Topology


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Layers that fit, on ranks of unequal size too."""
    num_experts = draw(st.integers(1, 24))
    slots_of_rank = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    usable = sum(min(slots, num_experts) for slots in slots_of_rank)
    if usable < num_experts:
        slots_of_rank.append(num_experts)
    nodes = draw(st.lists(st.integers(0, 3), min_size=len(slots_of_rank), max_size=len(slots_of_rank)))
    topology = Topology(slots_of_rank=tuple(slots_of_rank), node_of_rank=tuple(nodes))
    if draw(st.booleans()):
        loads = draw(st.lists(st.integers(0, 1000), min_size=num_experts, max_size=num_experts))
        return Case(np.array(loads, np.float64), None, topology)
    top_k = draw(st.integers(1, min(num_experts, 4)))
    topk_TK = topic_tokens(num_experts, top_k, draw(st.integers(1, 60)), seed=draw(st.integers(0, 99)))
    return Case(*count_routing(topk_TK, num_experts), topology)


def check(plan: LayerPlan, case: Case) -> None:
    table_RC = plan.slots.reshape(case.topology.num_ranks, case.topology.width)
    assert set(plan.slots[plan.slots >= 0].tolist()) == set(range(len(case.load_E)))
    for rank, row in enumerate(table_RC):
        held = row[row >= 0]
        assert len(held) == len(set(held.tolist())), "two replicas on one rank"
        assert (row[case.topology.slots_of_rank[rank] :] == -1).all(), "an expert in a slot that the rank lacks"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_placement_from_nothing(case: Case) -> None:
    plan = solve_layer(case.load_E, case.pair_EE, case.topology, OPTIONS)
    check(plan, case)
    held = (plan.slots >= 0).sum()
    assert held == case.topology.usable_slots(len(case.load_E)), "a usable slot is empty"
    assert plan.moves == ()
    if case.load_E.sum() > 0:
        load_R = rank_loads(plan.slots.reshape(case.topology.num_ranks, -1), case.load_E)
        load_only = solve_layer(case.load_E, None, case.topology, OPTIONS)
        cap = max(1 + OPTIONS.load_slack, 1 / load_only.balancedness)
        assert load_R.max() <= cap * load_R.mean() * (1 + 1e-6), "above the cap"
        assert plan.overload == 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), loads=st.integers(0, 12), seed=st.integers(0, 9))
def test_incremental_keeps_its_budget(case: Case, loads: int, seed: int) -> None:
    current = linear(len(case.load_E), case.topology)
    budget = Budget(slots=99, num_bytes=loads * 1000 + 999, bytes_per_expert=1000)
    plan = solve_layer(
        case.load_E,
        case.pair_EE,
        case.topology,
        SolverOptions(proposals=300, seed=seed),
        current=current,
        budget=budget,
    )
    check(plan, case)
    assert plan.num_loads <= loads
    assert np.array_equal(apply_moves(current, plan.moves), plan.slots)
    for move in plan.moves:
        assert current[move.slot] != plan.slots[move.slot]
        assert move.source_slot == -1 or current[move.source_slot] == move.expert


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), seed=st.integers(0, 9))
def test_moves_lead_from_the_old_to_the_new(case: Case, seed: int) -> None:
    before = solve_layer(np.roll(case.load_E, 1), None, case.topology, OPTIONS).slots
    plan = solve_layer(
        case.load_E, case.pair_EE, case.topology, SolverOptions(proposals=300, seed=seed), current=before
    )
    check(plan, case)
    assert np.array_equal(apply_moves(before, plan.moves), plan.slots)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_same_input_same_output(case: Case) -> None:
    one, other = (solve_layer(case.load_E, case.pair_EE, case.topology, OPTIONS) for _ in range(2))
    assert np.array_equal(one.slots, other.slots)
    assert one.balancedness == other.balancedness


def test_inputs_stay_as_they_are() -> None:
    topology = Topology.even(num_slots=20, num_ranks=4, num_nodes=2)
    load_E, pair_EE = count_routing(topic_tokens(16, 3, 500, seed=1), 16)
    current = linear(16, topology)
    kept = load_E.copy(), pair_EE.copy(), current.copy()
    solve_layer(load_E, pair_EE, topology, OPTIONS, current=current, budget=Budget(slots=4))
    assert np.array_equal(load_E, kept[0])
    assert np.array_equal(pair_EE, kept[1])
    assert np.array_equal(current, kept[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_numbers_that_are_no_loads_are_refused(bad: float) -> None:
    load_E = np.array([1.0, bad, 2.0, 3.0])
    with pytest.raises(ValueError, match="finite number"):
        solve_layer(load_E, None, Topology.even(num_slots=4, num_ranks=2))


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="3 usable slots a layer for 4 experts"):
        solve_layer(np.ones(4), None, Topology.even(num_slots=3, num_ranks=3))


@pytest.mark.parametrize("current", [[0, 1, 2, 4], [0, 1, 2], [0, 1, 2, -2], [0, 0, 1, 2], [0, 1, 2, -1]], ids=str)
def test_a_current_placement_that_is_none_is_refused(current: list[int]) -> None:
    topology = Topology.even(num_slots=4, num_ranks=2)
    with pytest.raises(ValueError, match=r"slots|experts|expert"):
        solve_layer(np.ones(4), None, topology, current=np.array(current, np.int32), budget=Budget(slots=2))
