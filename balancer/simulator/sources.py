"""Several attention ranks, on nodes of their own or beside expert ranks: where their tokens go, and how level it is.

Dimensions: S sources, T tokens of a source, K experts a token, R expert ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.score import ranks_chosen, tally
from expertmesh.balancer.solver.quotas import nearness, quota_shares
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh import placement

Ints = NDArray[np.int32]
Ids = NDArray[np.integer]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """``node`` and ``rank``: of the expert ranks, None = it is on no node of theirs, or is none of them."""

    node: int | None = None
    rank: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourcesScore:
    """Per token, over all sources: ranks and nodes visited, rows that leave their source's node, visits to ranks of
    other nodes. Of a source without a node every row leaves it. ``balancedness`` of all rows, and the mean over windows
    of so many tokens."""

    ranks: float
    nodes: float
    rows_away: float
    ranks_away: float
    balancedness: float
    windows: tuple[float, ...]


def quotas_for(slots: Ints, load_SE: Floats, sources: Sequence[Source], topology: Topology) -> Floats:
    """What the balancer gives the sources for these loads [S, R]."""
    near_SR = np.stack([nearness(topology.node_R, source.node, source.rank) for source in sources])
    return quota_shares(slots.reshape(topology.num_ranks, -1), load_SE, near_SR)


def route_sources(
    slots: Ints,
    topk_STK: Sequence[Ids],
    sources: Sequence[Source],
    topology: Topology,
    num_experts: int,
    share_SR: Floats | None,
    *,
    step_tokens: int,
) -> list[Ids]:
    """Rank of each choice of each source, by the code that attention ranks run; ``share_SR`` None = equal shares."""
    found: list[Ids] = []
    for number, (topk_TK, source) in enumerate(zip(topk_STK, sources, strict=True)):
        where = placement.Topology(
            slots_per_rank=topology.width,
            node_R=tuple(topology.node_R.tolist()),
            own_rank=source.rank,
            own_node=source.node,
            source=number,
        )
        quota_R = () if share_SR is None else share_SR[number].tolist()
        routing = placement.LayerRouting(slots.tolist(), num_experts, where, quota_R=quota_R)
        rank_TK = np.empty(topk_TK.shape, np.int64)
        for start in range(0, len(topk_TK), step_tokens):
            part = slice(start, start + step_tokens)
            rank_TK[part] = ranks_chosen(routing, topk_TK[part].astype(np.int64), topology)
            routing.commit()
        found.append(rank_TK)
    return found


def score_sources(
    rank_STK: Sequence[Ids], sources: Sequence[Source], topology: Topology, *, step_tokens: int, windows: Sequence[int]
) -> SourcesScore:
    """Of steps in which every source has ``step_tokens`` of its tokens, the first ones in each source's order."""
    steps = min(len(rank_TK) for rank_TK in rank_STK) // step_tokens
    rank_NSTK = np.stack([r[: steps * step_tokens].reshape(steps, step_tokens, -1) for r in rank_STK], axis=1)
    top_k = rank_NSTK.shape[-1]
    all_TK = rank_NSTK.reshape(-1, top_k)
    whole = tally(all_TK, topology)
    assert whole.fanout_ranks is not None
    assert whole.fanout_nodes is not None
    own_S = np.array([-1 if source.node is None else source.node for source in sources])
    own_T = np.tile(np.repeat(own_S, step_tokens), steps)
    is_away_TK = topology.node_R[all_TK] != own_T[:, None]
    visited_TR = np.zeros((len(all_TK), topology.num_ranks), np.bool_)
    visited_TR[np.arange(len(all_TK))[:, None], all_TK] = True
    return SourcesScore(
        ranks=whole.fanout_ranks,
        nodes=whole.fanout_nodes,
        rows_away=float(is_away_TK.sum() / len(all_TK)),
        ranks_away=float((visited_TR & (topology.node_R != own_T[:, None])).sum() / len(all_TK)),
        balancedness=whole.balancedness,
        windows=tuple(window_balancedness(all_TK, topology.num_ranks, window) for window in windows),
    )


def window_balancedness(rank_TK: Ids, num_ranks: int, window: int) -> float:
    """The mean over windows of so many tokens in a row."""
    whole = len(rank_TK) // window * window
    cell_TK = rank_TK[:whole] + num_ranks * (np.arange(whole) // window)[:, None]
    load_WR = np.bincount(cell_TK.ravel(), minlength=whole // window * num_ranks).reshape(-1, num_ranks)
    return float((load_WR.mean(axis=1) / load_WR.max(axis=1)).mean())
