"""Placements solved on the first part of a trace and scored on the rest."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    thread, slots to load a layer when the mesh holds the linear placement."""

    policy: str
    balancedness_mean: float
    balancedness_min: float
    fanout_ranks: float | None
    fanout_nodes: float | None
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


def simulate(trace: Trace, topology: Topology, train_fraction: float = 0.5) -> list[PolicyResult]:
    """Every policy's result. A load-only trace is solved and scored on the same loads.

    Raises:
        UserError: ``train_fraction`` leaves nothing to solve on or nothing to score.
    """
    split = _split(trace, train_fraction)
    load_LE, pair_LEE = trace.counts(slice(split))
    start_S = linear(trace.num_experts, topology)
    results = []
    for policy in policies(topology, trace.num_experts):
        policy.solve(load_LE[:1], None if pair_LEE is None else pair_LEE[:1], topology)  # compiled before it is timed
        started = time.thread_time()
        slots_LS = policy.solve(load_LE, pair_LEE, topology)
        solve_ms = (time.thread_time() - started) * 1e3
        scores = [_score(policy, trace, split, layer, slots_LS[layer], topology) for layer in range(trace.num_layers)]
        results.append(_result(policy, scores, solve_ms, _slots_loaded(slots_LS, start_S, topology)))
    return results


def _split(trace: Trace, train_fraction: float) -> int:
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


def _result(policy: Policy, scores: list[LayerScore], solve_ms: float, slots_loaded: float) -> PolicyResult:
    balanced = [score.balancedness for score in scores]
    ranks = [score.fanout_ranks for score in scores if score.fanout_ranks is not None]
    nodes = [score.fanout_nodes for score in scores if score.fanout_nodes is not None]
    return PolicyResult(
        policy=policy.name,
        balancedness_mean=float(np.mean(balanced)),
        balancedness_min=float(np.min(balanced)),
        fanout_ranks=float(np.mean(ranks)) if ranks else None,
        fanout_nodes=float(np.mean(nodes)) if nodes else None,
        solve_ms=solve_ms,
        slots_loaded_per_layer=slots_loaded,
    )
