"""Quotas against a general optimiser, and with the choice of replicas that ranks make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, minimize

from expertmesh.balancer.policy import LayerStatistics, Layout
from expertmesh.balancer.policy_solver import SolverPolicy
from expertmesh.balancer.solver import Topology, solve_layer
from expertmesh.balancer.solver.expected import balancedness, rank_loads
from expertmesh.balancer.solver.quotas import STIFFNESS, balanced_quotas, quota_loads
from expertmesh.mesh import placement

pytestmark = pytest.mark.slow  # the first run compiles

LAYOUT = Layout(width=5, room_R=(5,) * 4, node_R=("n",) * 4, server_R=("a", "b", "c", "d"))
TOPOLOGY = Topology.even(num_slots=20, num_ranks=4)


def drifted(seed: int) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.float64]]:
    """A placement, the loads that it was made for, and what they have become."""
    rng = np.random.default_rng(seed)
    load_E = rng.gamma(2.0, 100, 12)
    table_RC = solve_layer(load_E, None, TOPOLOGY).slots.reshape(4, 5)
    return table_RC, load_E, load_E * rng.uniform(0.6, 1.4, 12)


def cost(table_RC: NDArray[np.int32], quota_RC: NDArray[np.float64], load_E: NDArray[np.float64]) -> float:
    count_E = np.bincount(table_RC.ravel())
    away_RC = (quota_RC - 1 / count_E[table_RC]) * load_E[table_RC]
    return float((quota_loads(table_RC, quota_RC, load_E) ** 2).sum() + STIFFNESS * (away_RC**2).sum())


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_quotas_are_shares_and_the_same_again(seed: int) -> None:
    table_RC, _, load_E = drifted(seed)
    table_RC[0, 0] = -1 if (table_RC == table_RC[0, 0]).sum() > 1 else table_RC[0, 0]
    load_E[seed % 12] *= seed % 3  # nothing, as it is, twice
    quota_RC = balanced_quotas(table_RC, load_E)
    assert (quota_RC >= 0).all()
    assert (quota_RC[table_RC < 0] == 0).all()
    sums_E = np.bincount(table_RC[table_RC >= 0], weights=quota_RC[table_RC >= 0], minlength=12)
    assert sums_E == pytest.approx(np.ones(12))
    assert np.array_equal(quota_RC, balanced_quotas(table_RC, load_E))


@pytest.mark.parametrize("seed", range(4))
def test_quotas_are_optimal(seed: int) -> None:
    table_RC, _, load_E = drifted(seed)
    load_E /= load_E.mean()
    one_E20 = (table_RC.ravel() == np.arange(12)[:, None]).astype(float)
    found = minimize(
        lambda quota_S: cost(table_RC, quota_S.reshape(4, 5), load_E),
        one_E20.T @ (1 / one_E20.sum(axis=1)),
        bounds=[(0, 1)] * 20,
        constraints=LinearConstraint(one_E20, 1, 1),
        method="SLSQP",
    )
    assert cost(table_RC, balanced_quotas(table_RC, load_E), load_E) <= found.fun * (1 + 1e-6)


def test_no_load_is_shared_equally() -> None:
    table_RC, _, _ = drifted(1)
    count_E = np.bincount(table_RC.ravel())
    assert balanced_quotas(table_RC, np.zeros(12)) == pytest.approx(1 / count_E[table_RC])


def test_routing_levels_the_ranks_after_a_drift_with_quotas_and_before_they_come() -> None:
    table_RC, _, load_E = drifted(3)
    rng = np.random.default_rng(0)
    tokens_TK = np.argsort(-(np.log(load_E) + rng.gumbel(size=(4096, 12))), axis=1)[:, :2]
    load_E = np.bincount(tokens_TK.ravel(), minlength=12).astype(float)
    where = placement.Topology(slots_per_rank=5, node_R=(0,) * 4)
    for quotas in ([], balanced_quotas(table_RC, load_E).ravel().tolist()):
        routing = placement.LayerRouting(table_RC.ravel().tolist(), 12, where, quotas=quotas)
        slots = routing.choose_replicas(tokens_TK)
        balanced = balancedness(np.bincount(slots.ravel() // 5, minlength=4).astype(float))
        assert balanced > balancedness(rank_loads(table_RC, load_E)) + 0.03


def test_a_drift_is_met_with_quotas_before_slots_are_moved() -> None:
    table_RC, made_for_E, load_E = drifted(3)
    policy = SolverPolicy(replica_quotas=True)
    current = table_RC.ravel().tolist()
    steady = policy.propose(
        LayerStatistics(tokens=3e5, load_E=made_for_E * 300, coactivation_EE=None), LAYOUT, current, 4
    )
    assert not steady.worthwhile
    counts = LayerStatistics(tokens=3e5, load_E=load_E * 300, coactivation_EE=None)
    found = policy.propose(counts, LAYOUT, current, 4)
    assert found.worthwhile
    assert (found.num_loads, list(found.slots)) == (0, current)
    assert found.after.balancedness > found.before.balancedness + 0.03
    again = policy.propose(counts, LAYOUT, current, 4, found.quotas)
    assert again.before.balancedness == pytest.approx(found.after.balancedness)
    assert not again.worthwhile
    assert SolverPolicy().propose(counts, LAYOUT, current, 4).quotas == ()
