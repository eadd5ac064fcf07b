"""Quotas by source: level, near, the same again, and what the choice of replicas makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize

from expertmesh.balancer.solver.expected import held_experts
from expertmesh.balancer.solver.quotas import NEAR, nearness, quota_shares, settled_rows
from expertmesh.mesh.placement import LayerRouting, Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
NUM_EXPERTS, NODE_R = 12, np.array([0, 0, 1, 1])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Ints, Floats, Floats]:
    """A table of 12 experts on 4 ranks with replicas and empty slots, loads and nearness of 1 .. 4 sources."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width, num_sources = draw(st.integers(3, 8)), draw(st.integers(1, 4))
    table_R = [list(generator.permutation(NUM_EXPERTS)[part::4]) for part in range(4)]
    experts = list(generator.permutation(NUM_EXPERTS))
    for rank in range(4):
        table_R[rank] = experts[rank::4]
        others = [expert for expert in generator.permutation(NUM_EXPERTS) if expert not in table_R[rank]]
        table_R[rank] += others[: draw(st.integers(0, width - 3))]
        table_R[rank] += [-1] * (width - len(table_R[rank]))
    load_SE = generator.gamma(draw(st.sampled_from([0.3, 2.0, 20.0])), 100, (num_sources, NUM_EXPERTS))
    load_SE[:, generator.random(NUM_EXPERTS) < 0.2] = 0
    load_SE[:, 0] += 1
    own = [draw(st.sampled_from([(None, None), (0, None), (1, None), (0, 1)])) for _ in range(num_sources)]
    near_SR = np.stack([nearness(NODE_R, node, rank) for node, rank in own])
    return np.array(table_R, np.int32), load_SE, near_SR


def most_level(table_RC: Ints, load_E: Floats) -> float:
    """The load of the fullest rank in the most level split of all, by a general linear program."""
    expert, rank = np.nonzero(held_experts(table_RC, len(load_E)).T)
    rank_rows = np.zeros((len(table_RC), len(rank) + 1))
    rank_rows[rank, np.arange(len(rank))] = 1
    rank_rows[:, -1] = -1
    expert_rows = np.zeros((len(load_E), len(rank) + 1))
    expert_rows[expert, np.arange(len(rank))] = 1
    cost = np.append(np.zeros(len(rank)), 1.0)
    found = linprog(cost, rank_rows, np.zeros(len(table_RC)), expert_rows, load_E)
    return float(found.fun)


@given(problems())
def test_shares_are_shares_that_replicas_can_take_and_the_same_again(problem: tuple[Ints, Floats, Floats]) -> None:
    table_RC, load_SE, _ = problem
    share_SR = quota_shares(*problem)
    assert (share_SR >= 0).all()
    assert share_SR.sum(axis=1) == pytest.approx(np.ones(len(load_SE)))
    for share_R, load_E in zip(share_SR, load_SE, strict=True):
        reach_R = (np.where(table_RC >= 0, load_E[table_RC], 0.0)).sum(axis=1) / load_E.sum()
        assert (share_R <= reach_R + 1e-9).all(), "no more than a rank's replicas can be asked for"
        settled_R = settled_rows(table_RC, load_E, share_R) / load_E.sum()
        assert settled_R == pytest.approx(share_R, abs=0.005), "prices lead there"
    assert np.array_equal(share_SR, quota_shares(*problem))


@given(problems())
def test_totals_are_as_level_as_any_split(problem: tuple[Ints, Floats, Floats]) -> None:
    table_RC, load_SE, _ = problem
    load_R = (quota_shares(*problem) * load_SE.sum(axis=1, keepdims=True)).sum(axis=0)
    best = most_level(table_RC, load_SE.sum(axis=0))
    assert load_R.max() <= best + 0.01 * load_R.mean()


@given(problems(), st.floats(1e-3, 1e3))
def test_shares_do_not_depend_on_the_unit_or_the_order_of_sources(
    problem: tuple[Ints, Floats, Floats], unit: float
) -> None:
    table_RC, load_SE, near_SR = problem
    share_SR = quota_shares(*problem)
    assert quota_shares(table_RC, unit * load_SE, near_SR) == pytest.approx(share_SR, abs=1e-6)
    turned = quota_shares(table_RC, load_SE[::-1], near_SR[::-1])
    assert turned[::-1] == pytest.approx(share_SR, abs=1e-6)


def test_of_level_splits_it_is_the_nearest_to_what_sources_wish_for() -> None:
    """Against a general optimiser: of all splits that are level, the one of least relative entropy."""
    table_RC = np.array([[0, 1, 2], [0, 3, -1], [1, 2, 3], [0, 1, 2]], np.int32)
    load_SE = np.array([[5.0, 4.0, 3.0, 4.0], [2.0, 6.0, 5.0, 3.0]])
    near_SR = np.stack([nearness(NODE_R, 0, None), nearness(NODE_R, 1, None)])
    expert, rank = np.nonzero(held_experts(table_RC, 4).T)
    wish_SN = np.exp(near_SR[:, rank])
    goal = load_SE.sum() / 4

    def entropy(rows: Floats) -> float:
        rows_SN = np.maximum(rows.reshape(2, -1), 1e-12)
        return float((rows_SN * (np.log(rows_SN / wish_SN) - 1)).sum())

    of_expert = expert == np.arange(4)[:, None]
    of_rank = rank == np.arange(4)[:, None]
    start = (load_SE[:, expert] / of_expert.sum(axis=1)[expert]).ravel()
    found = minimize(
        entropy,
        start,
        bounds=[(0, None)] * start.size,
        constraints=[
            {"type": "eq", "fun": lambda rows: (rows.reshape(2, -1) @ of_expert.T - load_SE).ravel()},
            {"type": "eq", "fun": lambda rows: (rows.reshape(2, -1).sum(axis=0) @ of_rank.T - goal)[:3]},
        ],
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    expected_SR = (found.x.reshape(2, -1) @ of_rank.T) / load_SE.sum(axis=1, keepdims=True)
    assert quota_shares(table_RC, load_SE, near_SR) == pytest.approx(expected_SR, abs=0.005)


def test_a_replica_on_the_own_node_gets_most_where_all_are_alike() -> None:
    table_RC = np.array([[0], [1], [0], [1]], np.int32)
    near_SR = np.stack([nearness(NODE_R, 0, None), nearness(NODE_R, 1, None), nearness(NODE_R, None, None)])
    share_SR = quota_shares(table_RC, np.ones((3, 2)), near_SR)
    near = 0.5 * np.exp(NEAR) / (1 + np.exp(NEAR))
    assert share_SR[0] == pytest.approx([near, near, 0.5 - near, 0.5 - near])
    assert share_SR[1] == pytest.approx(share_SR[0][::-1])
    assert share_SR[2] == pytest.approx([0.25] * 4)


def test_sources_that_cannot_be_level_alone_are_so_together() -> None:
    """One asks for experts 0 and 1, which are on ranks 0, 1 and 2, the other for 2 and 3, on ranks 1, 2 and 3."""
    table_RC = np.array([[0, 1, -1], [0, 2, -1], [1, 3, -1], [2, 3, -1]], np.int32)
    load_SE = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    share_SR = quota_shares(table_RC, load_SE, np.zeros((2, 4)))
    assert share_SR[0] == pytest.approx([0.5, 0.25, 0.25, 0.0], abs=0.005)
    assert share_SR.sum(axis=0) / 2 == pytest.approx([0.25] * 4, abs=0.002)
    alone_R = sum(settled_rows(table_RC, load_E, np.full(4, 0.25)) for load_E in load_SE)
    assert np.max(alone_R) > 1.05


def test_a_source_follows_its_quota_and_goes_on_repeating_a_step() -> None:
    """The code that ranks run, over tokens of two experts each."""
    rng = np.random.default_rng(0)
    table_RC = np.array([[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5], [0, 2, 4, 5]], np.int32)
    quota_R = [0.4, 0.1, 0.25, 0.25]
    topology = Topology(slots_per_rank=4, node_R=(0, 0, 1, 1), own_node=0)
    routing = LayerRouting(table_RC.ravel().tolist(), 6, topology, quota_R=quota_R)
    load_R = np.zeros(4)
    for _ in range(200):
        expert_TK = np.stack([rng.choice(6, 2, replace=False) for _ in range(16)])
        slot_TK = routing.choose_replicas(expert_TK)
        assert np.array_equal(routing.choose_replicas(expert_TK), slot_TK)
        routing.commit()
        load_R += np.bincount(slot_TK.ravel() // 4, minlength=4)
    assert load_R / load_R.sum() == pytest.approx(quota_R, abs=0.02)
