"""Bounds and optima: against every placement there is, and where none can be found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertmesh.balancer.simulator.bounds import NotSolvedError, equal_split_bound, least_fanout
from expertmesh.balancer.simulator.optimum import check_optimum
from expertmesh.balancer.simulator.score import score_turns
from expertmesh.balancer.simulator.simulate import make_topology, simulate
from expertmesh.balancer.simulator.trace import Trace, trace_of_tokens
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError
from support.routing import topic_tokens

TOPOLOGY = Topology.even(num_slots=6, num_ranks=3)


def partitions(experts: tuple[int, ...]) -> Iterator[list[int]]:
    """Every way to put two experts on each rank."""
    if not experts:
        yield []
    for other in experts[1:]:
        rest = tuple(expert for expert in experts[1:] if expert != other)
        yield from ([experts[0], other, *more] for more in partitions(rest))


@pytest.mark.slow  # imports scipy
@pytest.mark.parametrize("seed", range(5))
def test_the_optimum_is_the_best_of_all_placements(seed: int) -> None:
    topk_TK = topic_tokens(6, 3, 200, seed=seed)
    scores = [score_turns(np.array(slots, np.int32), topk_TK, TOPOLOGY) for slots in partitions(tuple(range(6)))]
    assert len(scores) == 15
    cap = float(np.median([score.load_R.max() for score in scores]))
    best = min(float(score.fanout_ranks or 0) for score in scores if score.load_R.max() <= cap)
    assert least_fanout(topk_TK, 6, 2, cap) == pytest.approx(best)


def test_no_time_is_no_optimum() -> None:
    with pytest.raises(NotSolvedError):
        least_fanout(topic_tokens(16, 4, 500, seed=0), 16, 4, 1e9, time_limit_s=1e-6)


def test_the_equal_split_bound_by_hand() -> None:
    assert equal_split_bound(np.array([4.0, 1, 1, 1, 1]), 5, 2) == pytest.approx(1.0), "4 is the mean of two ranks"
    assert equal_split_bound(np.array([6.0, 1, 1]), 3, 2) == pytest.approx(4 / 6)
    assert equal_split_bound(np.array([6.0, 1, 1]), 4, 2) == pytest.approx(1.0), "the first one in two parts"


@pytest.mark.parametrize("seed", range(5))
def test_no_placement_beats_the_equal_split_bound(seed: int) -> None:
    load_E = np.random.default_rng(seed).gamma(0.3, 1, 6)
    bound = equal_split_bound(load_E, 6, 3)
    for slots in partitions(tuple(range(6))):
        load_R = load_E[slots].reshape(3, 2).sum(axis=1)
        assert load_R.mean() / load_R.max() <= bound + 1e-12


def trace(num_experts: int = 16) -> Trace:
    return trace_of_tokens(np.stack([topic_tokens(num_experts, 3, 600, seed=layer) for layer in range(2)]), num_experts)


@pytest.mark.slow
def test_policies_are_compared_with_the_optimum() -> None:
    results = {r.policy: r for r in simulate(trace(), make_topology(16, slots=16, ranks=8, nodes=1), 0.5, 60.0)}
    for name in ("eplb", "expertmesh"):
        result = results[name]
        assert result.optimum_layers == 2
        assert result.fanout_optimum is not None
        assert result.fanout_ranks is not None
        assert result.fanout_gap is not None
        assert result.fanout_gap == pytest.approx(result.fanout_ranks / result.fanout_optimum - 1)
        assert result.fanout_gap >= 0
    assert results["linear"].fanout_gap is None, "it loads a rank more than the cap"
    eplb, ours = results["eplb"].fanout_gap, results["expertmesh"].fanout_gap
    assert eplb is not None
    assert ours is not None
    assert ours < eplb


def test_without_time_the_optimum_is_none() -> None:
    result = simulate(trace(), make_topology(16, slots=16, ranks=8, nodes=1), 0.5, 1e-9)[-1]
    assert (result.fanout_optimum, result.fanout_gap, result.optimum_layers) == (None, None, 0)


@pytest.mark.parametrize(
    ("given", "mesh", "problem"),
    [
        (trace(), (20, 4), "20 slots for 16 experts make replicas"),
        (trace(32), (32, 2), "6e+08 sets of 16 experts"),
        (Trace(num_experts=16, topk_LTK=None, load_LE=np.ones((1, 16))), (16, 4), "loads alone"),
    ],
)
def test_where_no_optimum_can_be_found(given: Trace, mesh: tuple[int, int], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        check_optimum(given, make_topology(given.num_experts, slots=mesh[0], ranks=mesh[1], nodes=1))
    assert caught.value.key == "--optimum"
    assert problem in caught.value.problem
    assert caught.value.remedy


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str, *rest: Any) -> None:
        assert name == "scipy"

    monkeypatch.setattr("importlib.util.find_spec", none)
    with pytest.raises(UserError, match=r"pip install 'expertmesh\[optimum\]'"):
        check_optimum(trace(), make_topology(16, slots=16, ranks=8, nodes=1))
