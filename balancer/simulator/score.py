"""Score a placement of one layer on tokens, or on loads alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.expected import balancedness, rank_loads
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh import placement

Ints = NDArray[np.int32]
Ids = NDArray[np.integer]
Floats = NDArray[np.float64]
STEP_TOKENS = 512
"""Of one source; it matters only where there are several."""
TALLY_TOKENS = 4096


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
    """Replicas as attention ranks choose them."""
    return tally(route_locality_first(slots, topk_TK, topology, num_experts, warm_up_TK), topology)


def route_turns(slots: Ints, topk_TK: Ids, topology: Topology) -> Ids:
    """Rank of each choice [T, K], -1 where there is none: the replicas of an expert take turns over the tokens."""
    num_experts = int(max(topk_TK.max(), slots.max())) + 1
    homes = [np.flatnonzero(slots == expert) // topology.width for expert in range(num_experts)]
    count_E = np.array([max(len(home), 1) for home in homes])
    table_EW = np.array([np.resize(home, count_E.max()) if len(home) else [-1] * count_E.max() for home in homes])
    turn_TK = _turns(topk_TK, num_experts)
    return np.where(topk_TK >= 0, table_EW[topk_TK, turn_TK % count_E[topk_TK]], -1)


def route_locality_first(
    slots: Ints,
    topk_TK: Ids,
    topology: Topology,
    num_experts: int,
    warm_up_TK: Ids,
    *,
    sources: int = 1,
    step_tokens: int = STEP_TOKENS,
) -> Ids:
    """Rank of each choice [T, K], -1 where there is none, by the code that attention ranks run (``LayerRouting``), over
    the tokens in their order after those of ``warm_up_TK``.

    Args:
        sources: attention ranks, on nodes of their own, that get ``step_tokens`` of the tokens in turn and know of no
            others.
    """
    routings = [_routing(slots, topology, num_experts, source) for source in range(sources)]
    rank_TK = np.empty((len(warm_up_TK) + len(topk_TK), topk_TK.shape[1]), np.int64)
    tokens_TK = np.concatenate([warm_up_TK, topk_TK]).astype(np.int64)
    for step, start in enumerate(range(0, len(tokens_TK), step_tokens)):
        part, routing = slice(start, start + step_tokens), routings[step % sources]
        rank_TK[part] = ranks_chosen(routing, tokens_TK[part], topology)
        routing.commit()
    return rank_TK[len(warm_up_TK) :]


def _routing(slots: Ints, topology: Topology, num_experts: int, source: int) -> placement.LayerRouting:
    where = placement.Topology(slots_per_rank=topology.width, node_R=tuple(topology.node_R.tolist()), source=source)
    return placement.LayerRouting(slots.tolist(), num_experts, where)


def ranks_chosen(routing: placement.LayerRouting, expert_TK: NDArray[np.int64], topology: Topology) -> Ids:
    """Rank of each choice of a step, -1 where there is none."""
    slot_TK = routing.choose_replicas(expert_TK) if routing.is_replicated else routing.only_E.numpy()[expert_TK]
    return np.where(expert_TK >= 0, slot_TK // topology.width, -1)


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
    for start in range(0, len(rank_TK), TALLY_TOKENS):  # in parts: a part needs memory for tokens x ranks
        part_TK = rank_TK[start : start + TALLY_TOKENS]
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
