"""Placements solved on the first part of a trace and scored on the rest."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.bounds import equal_split_bound
from expertmesh.balancer.simulator.optimum import Optima, check_optimum, find_optima
from expertmesh.balancer.simulator.policies import Policy, policies
from expertmesh.balancer.simulator.score import LayerScore, score_loads, score_locality_first, score_turns
from expertmesh.balancer.simulator.trace import Trace
from expertmesh.balancer.solver.linear import linear
from expertmesh.balancer.solver.relabel import relabel
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError

Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyResult:
    """One policy on one trace: mean and minimum over layers, visits per token, CPU milliseconds for all layers on one
    thread, slots to load a layer when the mesh holds the linear placement.

    Args:
        balancedness_gap: by how much the mean is below what any placement could reach on the scored loads if replicas
            shared equally (``equal_split_bound``); negative where a choice of replicas does better than that.
        fanout_optimum: fewest ranks a token without replicas, over the layers that were solved; None unless asked for
            or where the time was up.
        fanout_gap: ``fanout_ranks`` above it on those layers, relative; None also for a policy that breaks its cap.
        optimum_layers: layers that were solved.
    """

    policy: str
    balancedness_mean: float
    balancedness_min: float
    balancedness_gap: float
    fanout_ranks: float | None
    fanout_nodes: float | None
    fanout_optimum: float | None = None
    fanout_gap: float | None = None
    optimum_layers: int = 0
    solve_ms: float
    slots_loaded_per_layer: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_topology(num_experts: int, *, slots: int, ranks: int, nodes: int) -> Topology:
    """Equal ranks and nodes.

    Raises:
        UserError: no such mesh can hold these experts.
    """
    for key, value in (("--slots", slots), ("--ranks", ranks), ("--nodes", nodes)):
        if value < 1:
            raise UserError(key, f"{value} is less than 1", "count slots of one layer, ranks and nodes from 1")
    if slots < num_experts:
        raise UserError("--slots", f"{slots} slots cannot hold {num_experts} experts", f"give {num_experts} or more")
    if ranks > slots:
        raise UserError("--ranks", f"{ranks} ranks are more than {slots} slots", "give every rank a slot at least")
    if slots % ranks:
        fitting = f"{slots - slots % ranks} or {slots - slots % ranks + ranks}"
        raise UserError("--slots", f"{slots} slots do not divide over {ranks} ranks", f"give for example {fitting}")
    if ranks % nodes:
        raise UserError("--nodes", f"{ranks} ranks do not divide over {nodes} nodes", "give nodes of equal size")
    if num_experts < slots // ranks:
        fewer = f"at most {num_experts * ranks} slots are of use"
        raise UserError("--slots", f"{slots // ranks} slots a rank for {num_experts} experts", fewer)
    return Topology.even(num_slots=slots, num_ranks=ranks, num_nodes=nodes)


def simulate(
    trace: Trace, topology: Topology, train_fraction: float = 0.5, optimum_s: float | None = None
) -> list[PolicyResult]:
    """Every policy's result. A load-only trace is solved and scored on the same loads.

    Args:
        optimum_s: find the optimal fan-out of each layer, for so many seconds in all; None: do not.

    Raises:
        UserError: ``train_fraction`` leaves nothing to solve on or nothing to score, or no optimum can be found here.
    """
    split = split_at(trace, train_fraction)
    if optimum_s is not None:
        check_optimum(trace, topology)
    load_LE, pair_LEE = trace.counts(slice(split))
    start_S = linear(trace.num_experts, topology)
    bound = _bound(trace, split, topology)
    results: list[PolicyResult] = []
    scores_of: dict[str, list[LayerScore]] = {}
    for policy in policies(topology, trace.num_experts):
        policy.solve(load_LE[:1], None if pair_LEE is None else pair_LEE[:1], topology)  # compiled before it is timed
        started = time.thread_time()
        slots_LS = policy.solve(load_LE, pair_LEE, topology)
        solve_ms = (time.thread_time() - started) * 1e3
        scores = [_score(policy, trace, split, layer, slots_LS[layer], topology) for layer in range(trace.num_layers)]
        scores_of[policy.name] = scores
        results.append(_result(policy, scores, bound, solve_ms, _slots_loaded(slots_LS, start_S, topology)))
    if optimum_s is None or trace.topk_LTK is None:
        return results
    per_rank = topology.num_slots // topology.num_ranks
    optima = find_optima(trace.topk_LTK[:, split:], trace.num_experts, per_rank, scores_of, optimum_s)
    return [_with_optimum(result, optima, scores_of[result.policy]) for result in results]


def _bound(trace: Trace, split: int, topology: Topology) -> float:
    """``equal_split_bound`` on what is scored, the mean over layers."""
    load_LE, _ = trace.counts(slice(split, None))
    return float(np.mean([equal_split_bound(load_E, topology.num_slots, topology.num_ranks) for load_E in load_LE]))


def split_at(trace: Trace, train_fraction: float) -> int:
    """Tokens before the split; 0 for a load-only trace.

    Raises:
        UserError: one side is empty.
    """
    if trace.topk_LTK is None:
        return 0
    split = round(trace.num_tokens * train_fraction) if 0 < train_fraction < 1 else 0
    if not 0 < split < trace.num_tokens:
        found = f"{train_fraction} of {trace.num_tokens} tokens leaves a part empty"
        raise UserError("--train-fraction", found, "give a fraction above 0 and below 1, of a trace of two or more")
    return split


def _score(policy: Policy, trace: Trace, split: int, layer: int, slots_S: Ints, topology: Topology) -> LayerScore:
    if trace.topk_LTK is None:
        return score_loads(slots_S, trace.load_LE[layer], topology)
    before_TK, after_TK = trace.topk_LTK[layer, :split], trace.topk_LTK[layer, split:]
    if policy.locality_first:
        return score_locality_first(slots_S, after_TK, topology, trace.num_experts, before_TK)
    return score_turns(slots_S, after_TK, topology)


def _slots_loaded(slots_LS: Ints, start_S: Ints, topology: Topology) -> float:
    start_RC = start_S.reshape(topology.num_ranks, -1)
    num_experts = int(start_S.max()) + 1
    loaded = [
        int((relabel(slots_S.reshape(start_RC.shape), start_RC, topology, num_experts) != start_RC).sum())
        for slots_S in slots_LS
    ]
    return float(np.mean(loaded))


def _with_optimum(result: PolicyResult, optima: Optima, scores: list[LayerScore]) -> PolicyResult:
    solved = optima.of_layer
    if not solved:
        return replace(result, optimum_layers=0)
    optimum = float(np.mean(list(solved.values())))
    fanout = np.mean([scores[layer].fanout_ranks for layer in solved])
    keeps_cap = all(scores[layer].load_R.max() <= optima.cap_L[layer] for layer in solved)
    gap = float(fanout / optimum - 1) if keeps_cap else None
    return replace(result, fanout_optimum=optimum, fanout_gap=gap, optimum_layers=len(solved))


def _result(
    policy: Policy, scores: list[LayerScore], bound: float, solve_ms: float, slots_loaded: float
) -> PolicyResult:
    balanced = [score.balancedness for score in scores]
    ranks = [score.fanout_ranks for score in scores if score.fanout_ranks is not None]
    nodes = [score.fanout_nodes for score in scores if score.fanout_nodes is not None]
    return PolicyResult(
        policy=policy.name,
        balancedness_mean=float(np.mean(balanced)),
        balancedness_min=float(np.min(balanced)),
        balancedness_gap=bound - float(np.mean(balanced)),
        fanout_ranks=float(np.mean(ranks)) if ranks else None,
        fanout_nodes=float(np.mean(nodes)) if nodes else None,
        solve_ms=solve_ms,
        slots_loaded_per_layer=slots_loaded,
    )
