"""Score a placement of one layer on tokens, or on loads alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.replica_choice import ReplicaChooser
from expertmesh.balancer.solver.expected import balancedness, held_experts, rank_loads
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Ids = NDArray[np.integer]
Floats = NDArray[np.float64]
MAX_STEP_TOKENS = 4096
MIN_STEPS = 32
"""A short trace is cut into so many steps, so that prices can follow the load."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerScore:
    """``load_R`` in tokens; fan-out per token, None without tokens."""

    load_R: Floats
    fanout_ranks: float | None
    fanout_nodes: float | None

    @property
    def balancedness(self) -> float:
        return balancedness(self.load_R)


def score_loads(slots: Ints, load_E: Floats, topology: Topology) -> LayerScore:
    """Replicas share their expert's load equally."""
    load_R = rank_loads(slots.reshape(topology.num_ranks, -1), load_E)
    return LayerScore(load_R=load_R, fanout_ranks=None, fanout_nodes=None)


def score_turns(slots: Ints, topk_TK: Ids, topology: Topology) -> LayerScore:
    """The replicas of an expert take turns over the tokens."""
    return tally(route_turns(slots, topk_TK, topology), topology)


def score_locality_first(
    slots: Ints, topk_TK: Ids, topology: Topology, num_experts: int, warm_up_TK: Ids
) -> LayerScore:
    """Replicas as ``ReplicaChooser`` chooses them."""
    return tally(route_locality_first(slots, topk_TK, topology, num_experts, warm_up_TK), topology)


def route_turns(slots: Ints, topk_TK: Ids, topology: Topology) -> Ids:
    """Rank of each choice [T, K], -1 where there is none: the replicas of an expert take turns over the tokens."""
    num_experts = int(max(topk_TK.max(), slots.max())) + 1
    homes = [np.flatnonzero(slots == expert) // topology.width for expert in range(num_experts)]
    count_E = np.array([max(len(home), 1) for home in homes])
    table_EW = np.array([np.resize(home, count_E.max()) if len(home) else [-1] * count_E.max() for home in homes])
    turn_TK = _turns(topk_TK, num_experts)
    return np.where(topk_TK >= 0, table_EW[topk_TK, turn_TK % count_E[topk_TK]], -1)


def route_locality_first(slots: Ints, topk_TK: Ids, topology: Topology, num_experts: int, warm_up_TK: Ids) -> Ids:
    """Rank of each choice [T, K], -1 where there is none: ``ReplicaChooser`` over the tokens in their order, step by
    step, after the steps of ``warm_up_TK``."""
    held_RE = held_experts(slots.reshape(topology.num_ranks, -1), num_experts)
    chooser = ReplicaChooser(holds_RE=held_RE, node_R=topology.node_R)
    step = max(min(MAX_STEP_TOKENS, len(topk_TK) // MIN_STEPS), 1)
    for start in range(max(len(warm_up_TK) - MIN_STEPS * step, 0), len(warm_up_TK), step):
        chooser.choose(warm_up_TK[start : start + step], start)
    starts = range(0, len(topk_TK), step)
    return np.concatenate([chooser.choose(topk_TK[start : start + step], start) for start in starts])


def _turns(topk_TK: Ids, num_experts: int) -> NDArray[np.int64]:
    """How often each choice's expert was chosen before, in the order of tokens."""
    flat = topk_TK.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")
    starts = np.searchsorted(flat[order], np.arange(-1, num_experts))
    turn = np.empty(len(flat), np.int64)
    turn[order] = np.arange(len(flat)) - starts[flat[order] + 1]
    return turn.reshape(topk_TK.shape)


def tally(rank_TK: Ids, topology: Topology) -> LayerScore:
    """What tokens that go to these ranks make of load and fan-out."""
    load_R = np.zeros(topology.num_ranks)
    ranks = nodes = tokens = 0
    for start in range(0, len(rank_TK), MAX_STEP_TOKENS):  # in parts: a part needs memory for tokens x ranks
        part_TK = rank_TK[start : start + MAX_STEP_TOKENS]
        chosen_TK = part_TK >= 0
        load_R += np.bincount(part_TK[chosen_TK], minlength=topology.num_ranks)
        ranks += _distinct(part_TK, topology.num_ranks)
        nodes += _distinct(np.where(chosen_TK, topology.node_R[part_TK], -1), topology.num_nodes)
        tokens += int(chosen_TK.any(axis=1).sum())
    return LayerScore(load_R=load_R, fanout_ranks=ranks / max(tokens, 1), fanout_nodes=nodes / max(tokens, 1))


def _distinct(group_TK: Ids, num_groups: int) -> int:
    """Pairs of a token and a group that it visits."""
    visited_TG = np.zeros((len(group_TK), num_groups + 1), np.bool_)  # the last column takes the -1
    visited_TG[np.arange(len(group_TK))[:, None], group_TK] = True
    return int(visited_TG[:, :num_groups].sum())
