"""The solver's parts against brute force and against what tokens really do."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from expertmesh.balancer.simulator.score import score_turns
from expertmesh.balancer.solver import (
    Budget,
    SolverOptions,
    Topology,
    count_routing,
    dispersion_of,
    eplb_global,
    eplb_hierarchical,
    evaluate,
    judge,
    linear,
    migration_list,
    solve_layer,
)
from expertmesh.balancer.solver.anneal import Goal, anneal, total_savings
from expertmesh.balancer.solver.balance import min_max_replicas
from expertmesh.balancer.solver.expected import held_experts, rank_loads
from expertmesh.balancer.solver.problem import build_problem
from expertmesh.balancer.solver.relabel import assign, relabel
from expertmesh.balancer.solver.relieve import best_change, layer_of, relieve
from expertmesh.balancer.solver.search_state import SearchState, build_state
from support.routing import topic_tokens

TOPOLOGY = Topology.even(num_slots=40, num_ranks=8, num_nodes=2)
ONE_E = np.ones(32, np.int32)
"""Nothing is asked for but one replica of each expert."""


def test_min_max_replicas_is_optimal() -> None:
    load_E = np.array([9.0, 5.0, 4.0, 1.0])
    replicas_E = min_max_replicas(load_E, 7, 4, ONE_E[:4])
    assert replicas_E.tolist() == [3, 2, 1, 1]
    best = min(
        max(9 / a, 5 / b, 4 / c, 1 / d)
        for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) for d in range(1, 5) if a + b + c + d == 7
    )  # fmt: skip
    assert (load_E / replicas_E).max() == best


def test_no_expert_gets_more_replicas_than_ranks() -> None:
    assert min_max_replicas(np.array([100.0, 1.0]), 6, 3, ONE_E[:2]).tolist() == [3, 3]


def test_no_expert_gets_fewer_replicas_than_its_floor() -> None:
    floor_E = np.array([1, 1, 2], np.int32)
    assert min_max_replicas(np.array([9.0, 4.0, 1.0]), 6, 4, floor_E).tolist() == [3, 1, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_assignment_is_the_cheapest(size: int) -> None:
    cost_IJ = np.random.default_rng(size).random((size, size))
    rows = np.arange(size)
    cheapest = min(cost_IJ[rows, list(order)].sum() for order in permutations(range(size)))
    assert cost_IJ[rows, assign(cost_IJ)].sum() == pytest.approx(cheapest)


def test_renamed_ranks_of_renamed_nodes_move_nothing() -> None:
    current_RC = np.arange(32, dtype=np.int32).reshape(8, 4)
    shuffled_RC = current_RC[[6, 5, 4, 7, 1, 0, 3, 2]][:, [2, 0, 3, 1]]
    topology = Topology.even(num_slots=32, num_ranks=8, num_nodes=2)
    assert np.array_equal(relabel(shuffled_RC, current_RC, topology, 32), current_RC)


def test_ranks_do_not_leave_their_node() -> None:
    current_RC = np.arange(32, dtype=np.int32).reshape(8, 4)
    topology = Topology.even(num_slots=32, num_ranks=8, num_nodes=2)
    across_RC = current_RC[[4, 1, 2, 3, 0, 5, 6, 7]]
    renamed_RC = relabel(across_RC, current_RC, topology, 32)
    assert (renamed_RC != current_RC).sum() == 8
    contents = {frozenset(row) for row in across_RC[:4].tolist()}
    assert {frozenset(row) for row in renamed_RC[:4].tolist()} == contents


def test_sources_are_near_and_take_turns() -> None:
    topology = Topology.even(num_slots=8, num_ranks=4, num_nodes=2)
    current = np.array([0, 1, 2, 3, 0, 1, 2, 3], np.int32)
    planned = np.array([0, 2, 2, 0, 0, 1, 1, 3], np.int32)
    moves = migration_list(current, planned, topology)
    assert [(move.slot, move.expert, move.source_slot) for move in moves] == [(1, 2, 2), (3, 0, 0), (6, 1, 5)]


def test_an_expert_that_nobody_holds_comes_from_the_checkpoint() -> None:
    topology = Topology.even(num_slots=4, num_ranks=2)
    moves = migration_list(np.array([0, 1, -1, -1], np.int32), np.array([0, 1, 2, -1], np.int32), topology)
    assert [(move.slot, move.expert, move.source_slot) for move in moves] == [(2, 2, -1)]


def test_eplb_on_a_small_case() -> None:
    load_LE = np.array([[90.0, 40.0, 30.0, 20.0]])
    slots_S = eplb_global(load_LE, 6, 2)[0]
    # Replicas of 0 and 1 first (90 → 45 → 30, then 40 → 20); heaviest first onto the lightest rank.
    assert sorted(slots_S.tolist()) == [0, 0, 0, 1, 2, 3] or sorted(slots_S.tolist()) == [0, 0, 1, 1, 2, 3]
    assert np.array_equal(np.unique(slots_S), np.arange(4))


def test_eplb_hierarchical_keeps_groups_on_nodes() -> None:
    load_LE = np.random.default_rng(0).random((3, 16))
    slots_LNs = eplb_hierarchical(load_LE, 24, 4, num_nodes=2, num_groups=4).reshape(3, 2, 12)
    for layer in slots_LNs:
        groups = [set((node // 4).tolist()) for node in layer]
        assert groups[0].isdisjoint(groups[1])
        assert len(groups[0] | groups[1]) == 4


def test_load_only_is_better_balanced_than_eplb() -> None:
    load_E = np.random.default_rng(3).lognormal(sigma=1.2, size=64)
    topology = Topology.even(num_slots=80, num_ranks=16)
    eplb = evaluate(eplb_global(load_E[None], 80, 16)[0].astype(np.int32), load_E, None, topology)
    assert solve_layer(load_E, None, topology).balancedness > eplb.balancedness


def test_joint_search_lowers_fanout_of_new_tokens() -> None:
    topk_TK = topic_tokens(32, 4, 6000, seed=2)
    load_E, pair_EE = count_routing(topk_TK[:3000], 32)
    joint = solve_layer(load_E, pair_EE, TOPOLOGY, SolverOptions(proposals=8000)).slots
    ours = score_turns(joint, topk_TK[3000:], TOPOLOGY)
    load_only = score_turns(solve_layer(load_E, None, TOPOLOGY).slots, topk_TK[3000:], TOPOLOGY)
    assert ours.fanout_ranks is not None
    assert load_only.fanout_ranks is not None
    assert ours.fanout_ranks < load_only.fanout_ranks - 0.2


@pytest.mark.parametrize("joint", [False, True])
def test_predicted_fanout_is_close_without_replicas(joint: bool) -> None:
    topology = Topology.even(num_slots=32, num_ranks=8, num_nodes=2)
    topk_TK = topic_tokens(32, 4, 4000, seed=5)
    load_E, pair_EE = count_routing(topk_TK, 32)
    slots = solve_layer(load_E, pair_EE if joint else None, topology).slots
    predicted = evaluate(slots, load_E, pair_EE, topology)
    scored = score_turns(slots, topk_TK, topology)
    assert predicted.fanout_ranks == pytest.approx(scored.fanout_ranks, rel=0.06)
    assert predicted.fanout_nodes == pytest.approx(scored.fanout_nodes, rel=0.06)


def searched_state(num_proposals: int) -> tuple[SearchState, SearchState, Goal]:
    """A state after a search, and one built afresh from the table that the search left."""
    load_E, pair_EE = count_routing(topic_tokens(32, 4, 500, seed=7), 32)
    problem = build_problem(load_E, pair_EE, TOPOLOGY)
    table_RC = solve_layer(load_E, None, TOPOLOGY).slots.reshape(8, 5)
    goal = Goal(1.05, 0.8, 1.0, 0.5, 0.5, 1.0, 0.0, False, 1 << 40)
    before_RE = np.ones((8, 32), np.bool_)

    def state() -> SearchState:
        places = table_RC.copy(), TOPOLOGY.room_R, TOPOLOGY.node_R, 2
        return build_state(*places, problem.load_E, problem.pair_EE, problem.likeness_EE, before_RE, ONE_E)

    searched = state()
    anneal(searched, goal, num_proposals, 0.05, 0.01, 0.3, np.array([9], np.uint64))
    table_RC = searched.table_RC
    return searched, state(), goal


def test_the_search_keeps_its_sums_true() -> None:
    searched, fresh, _ = searched_state(3000)
    assert not np.array_equal(searched.replicas_E, np.ones(32))
    for name in ("near_RE", "near_NE", "load_R", "fixed_R", "triples_RC", "credit_E", "count_NE", "holds_RE"):
        assert np.allclose(getattr(searched, name), getattr(fresh, name), atol=1e-9), name


def test_the_search_finds_more_savings() -> None:
    start, _, goal = searched_state(1)
    found, _, _ = searched_state(8000)
    assert total_savings(found, goal) > total_savings(start, goal) * 1.2


def test_incremental_search_relieves_the_fullest_rank_first() -> None:
    topology = Topology.even(num_slots=10, num_ranks=4)
    load_E = np.array([8.0, 7.0, 1, 1, 1, 1, 1, 1])
    current = linear(8, topology)
    plans = [solve_layer(load_E, None, topology, current=current, budget=Budget(slots=slots)) for slots in (0, 1, 2, 6)]
    assert plans[0].moves == ()
    assert plans[0].overload > 0
    balanced = [plan.balancedness for plan in plans]
    assert balanced == sorted(balanced)
    assert balanced[-1] > 1.3 * balanced[0]


def brute_relief(table_RC: NDArray[np.int32], load_E: NDArray[np.float64]) -> float:
    """The largest drop of the sum of squares above the mean that one swap, replacement or filling brings per load."""

    def squares(table_RC: NDArray[np.int32]) -> float:
        return float((np.maximum(rank_loads(table_RC, load_E) - load_E.sum() / len(table_RC), 0) ** 2).sum())

    top = int(rank_loads(table_RC, load_E).argmax())
    cells = [(r, c) for r in range(table_RC.shape[0]) for c in range(table_RC.shape[1])]
    found = [0.0]
    for r, c in cells:
        for e in range(len(load_E)):
            trial_RC = table_RC.copy()
            trial_RC[r, c] = e
            gives_way = r != top if table_RC[r, c] < 0 else (table_RC == table_RC[r, c]).sum() > 1
            if gives_way and e not in table_RC[r] and (r == top or e in table_RC[top]):
                found.append(squares(table_RC) - squares(trial_RC))
        for d in range(table_RC.shape[1]):
            e, f = table_RC[top, d], table_RC[r, c]
            if r != top and min(e, f) >= 0 and e not in table_RC[r] and f not in table_RC[top]:
                trial_RC = table_RC.copy()
                trial_RC[top, d], trial_RC[r, c] = f, e
                found.append((squares(table_RC) - squares(trial_RC)) / 2)
    return max(found)


@pytest.mark.parametrize("seed", range(12))
def test_the_first_change_relieves_as_much_as_any(seed: int) -> None:
    rng = np.random.default_rng(seed)
    topology = Topology.even(num_slots=16, num_ranks=4)
    load_E = rng.gamma(0.6, 100, 10)
    current_RC = solve_layer(rng.permutation(load_E), None, topology).slots.reshape(4, 4)
    for r in range(seed % 4):  # room for fillings
        replicas_E = np.bincount(current_RC[current_RC >= 0], minlength=10)
        current_RC[r, [c for c in range(4) if replicas_E[current_RC[r, c]] > 1][:1]] = -1
    load_E *= 4 / load_E.sum()
    layer = layer_of(current_RC.copy(), topology.room_R, load_E, held_experts(current_RC, 10), ONE_E[:10])
    assert best_change(layer, 2, 0.0).gain == pytest.approx(brute_relief(current_RC, load_E), abs=1e-9)
    changed_RC = current_RC.copy()
    moved = relieve(changed_RC, topology.room_R, load_E, layer.was_RE, ONE_E[:10], 1.0, 3, 0.0)
    assert moved <= 3
    assert rank_loads(changed_RC, load_E).max() <= rank_loads(current_RC, load_E).max() + 1e-12


def test_noise_moves_nothing_and_a_shift_does() -> None:
    topk_TK = topic_tokens(32, 4, 12000, seed=11)
    load_E, pair_EE = count_routing(topk_TK[:6000], 32)
    current = solve_layer(load_E, pair_EE, TOPOLOGY).slots
    for tokens_TK, expected in ((topk_TK[6000:], False), (topic_tokens(32, 4, 6000, seed=12), True)):
        counts = count_routing(tokens_TK, 32)
        plan = solve_layer(*counts, TOPOLOGY, current=current, budget=Budget(slots=8))
        now = evaluate(current, *counts, TOPOLOGY)
        assert judge(now, plan, TOPOLOGY, tokens=6000, top_k=4).worthwhile is expected


def test_dispersion_tells_bursty_from_independent_counts() -> None:
    rng = np.random.default_rng(0)
    mean_E = rng.uniform(50, 500, 64)
    independent_WE = rng.poisson(mean_E, (10, 64)).astype(np.float64)
    bursty_WE = rng.poisson(mean_E * rng.gamma(2.0, 0.5, (10, 64))).astype(np.float64)
    assert dispersion_of(independent_WE) < 2
    assert dispersion_of(bursty_WE) > 10
