"""Quotas by source: what share of its rows each attention rank should send to each expert rank.

Each source would have its rows near, and all of them together have to be level over the ranks. A source that levels its
own rows alone cannot do both: it sends half of them to the other node, and where its traffic is of one kind even the
best it can do leaves ranks unlevel that another source's rows would have filled.

Entropic transport (Wilson's gravity model of 1967; M. Cuturi, "Sinkhorn Distances", 2013): of all splits that level the
ranks the one nearest to a wish, in which a replica on the source's node gets e^NEAR of what another gets. Its dual is
smooth and convex in one price a rank, and Newton's method needs some ten steps. Where no split is level, a quadratic
penalty takes the place of the condition, so the result is as level as replicas allow.

Dimensions: E experts, R ranks, C slots of the widest rank, S sources, G groups of sources, W most ranks that an expert
is on, M pairs of a group and an expert with replicas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

NEAR = 2.0
"""On gpt-oss-20b's tokens 1 made a fifth more rows leave their node, two thirds more with many replicas; 5 made
tokens visit 4 % more ranks, less level."""
OWN_RANK = 1.0
"""Of a source's own rank beside that of its node. It matters little: few replicas are on any one rank."""
STIFFNESS = 2000.0
"""Price of a rank that has twice the mean: ranks that can be level are so within some thousandths."""
STEPS = 100
SETTLED = 1e-8


def quota_shares(table_RC: Ints, load_SE: Floats, near_SR: Floats) -> Floats:
    """Share of its rows that each source should send to each rank, float64 [S, R]; a source's add up to 1.

    Args:
        table_RC: slot → expert, -1 = empty; every expert has a slot.
        load_SE: rows of each source for each expert, in one unit for all; every source has some.
        near_SR: how much a source is drawn to a rank, see ``nearness``.
    """
    near_GR, group_S = np.unique(near_SR, axis=0, return_inverse=True)
    group_S = group_S.ravel()
    load_GE = np.zeros((len(near_GR), load_SE.shape[1]))
    np.add.at(load_GE, group_S, load_SE)
    goal_R = np.full(len(table_RC), load_SE.sum() / len(table_RC))
    split_GER = _split(table_RC, load_GE, near_GR, goal_R)
    rows_SR = np.stack([load_E @ split_GER[group] for load_E, group in zip(load_SE, group_S, strict=True)])
    share_SR: Floats = rows_SR / load_SE.sum(axis=1, keepdims=True)
    return share_SR


def settled_rows(table_RC: Ints, load_E: Floats, share_R: Floats) -> Floats:
    """Rows that one source sends to each rank [R] when its prices lead it to these shares as far as replicas reach."""
    split_GER = _split(table_RC, load_E[None], np.zeros((1, len(table_RC))), share_R * load_E.sum())
    rows_R: Floats = load_E @ split_GER[0]
    return rows_R


def nearness(node_R: NDArray[np.integer], own_node: int | None, own_rank: int | None) -> Floats:
    """How much a source on this node is drawn to each rank [R]; None = it is on no expert rank's node, or is none."""
    near_R = np.where(node_R == own_node, NEAR, 0.0) if own_node is not None else np.zeros(len(node_R))
    if own_rank is not None:
        near_R[own_rank] += OWN_RANK
    return near_R


def _split(table_RC: Ints, load_GE: Floats, near_GR: Floats, goal_R: Floats) -> Floats:
    """Share of each group's rows for an expert that each rank gets, float64 [G, E, R]."""
    (num_groups, num_experts), num_ranks = load_GE.shape, len(table_RC)
    held_ER = np.zeros((num_experts, num_ranks), np.bool_)
    rank, slot = np.nonzero(table_RC >= 0)
    held_ER[table_RC[rank, slot], rank] = True
    split_GER = np.broadcast_to(held_ER / held_ER.sum(axis=1, keepdims=True), (num_groups, *held_ER.shape)).copy()
    replicated = np.flatnonzero(held_ER.sum(axis=1) > 1)
    if not len(replicated):
        return split_GER
    scale = load_GE.sum() / num_ranks
    is_alone_E = held_ER.sum(axis=1) == 1
    free_R = (goal_R - load_GE[:, is_alone_E].sum(axis=0) @ held_ER[is_alone_E]) / max(scale, 1e-300)
    rank_EW = _ranks(held_ER[replicated])
    near_MW = np.where(rank_EW >= 0, near_GR[:, rank_EW], -np.inf).reshape(-1, rank_EW.shape[1])
    load_M = load_GE[:, replicated].ravel() / max(scale, 1e-300)
    rank_MW = np.tile(rank_EW, (num_groups, 1))
    share_MW = _Dual(load_M, rank_MW, near_MW, free_R).shares()
    group_M, expert_M = np.divmod(np.arange(len(load_M)), len(replicated))
    at = np.nonzero(rank_MW >= 0)
    split_GER[group_M[at[0]], replicated[expert_M[at[0]]], rank_MW[at]] = share_MW[at]
    return split_GER


def _ranks(held_ER: NDArray[np.bool_]) -> Ints:
    """The ranks of each expert, -1 behind the last one."""
    count_E = held_ER.sum(axis=1)
    rank_EW = np.full((len(held_ER), count_E.max()), -1, np.int32)
    rank_EW[np.arange(rank_EW.shape[1]) < count_E[:, None]] = np.nonzero(held_ER)[1]
    return rank_EW


class _Dual:
    """Prices of ranks that minimise the sum of load x log-sum-exp(near - price) over M and of free x price +
    price² / 2 STIFFNESS over R."""

    def __init__(self, load_M: Floats, rank_MW: Ints, near_MW: Floats, free_R: Floats) -> None:
        self._load_M = load_M
        self._rank_MW = np.maximum(rank_MW, 0)  # behind the last one shares are 0, whatever the rank
        self._near_MW = near_MW
        self._free_R = free_R

    def shares(self) -> Floats:
        price_R = np.zeros(len(self._free_R))
        value = self._value(price_R)
        for _ in range(STEPS):
            share_MW = self._shares(price_R)
            slope_R = self._free_R - self._rows(share_MW) + price_R / STIFFNESS
            step_R = -np.linalg.solve(self._curvature(share_MW), slope_R)
            decrease = float(slope_R @ step_R)
            if decrease > -(SETTLED**2):
                break
            length, following = 1.0, self._value(price_R + step_R)
            while following > value + 1e-4 * length * decrease and length > SETTLED:
                length /= 2
                following = self._value(price_R + length * step_R)
            price_R, value = price_R + length * step_R, following
            if np.abs(length * step_R).max() < SETTLED:
                break
        return self._shares(price_R)

    def _value(self, price_R: Floats) -> float:
        cost_MW = self._near_MW - price_R[self._rank_MW]
        top_M = cost_MW.max(axis=1)
        log_M = top_M + np.log(np.exp(cost_MW - top_M[:, None]).sum(axis=1))
        return float(self._load_M @ log_M + self._free_R @ price_R + price_R @ price_R / (2 * STIFFNESS))

    def _shares(self, price_R: Floats) -> Floats:
        cost_MW = self._near_MW - price_R[self._rank_MW]
        weight_MW = np.exp(cost_MW - cost_MW.max(axis=1, keepdims=True))
        shares_MW: Floats = weight_MW / weight_MW.sum(axis=1, keepdims=True)
        return shares_MW

    def _rows(self, share_MW: Floats) -> Floats:
        rows_MW = share_MW * self._load_M[:, None]
        count_R = np.bincount(self._rank_MW.ravel(), weights=rows_MW.ravel(), minlength=len(self._free_R))
        return count_R.astype(np.float64)

    def _curvature(self, share_MW: Floats) -> Floats:
        """The second derivatives [R, R]."""
        num_ranks = len(self._free_R)
        pair_MWW = (self._load_M[:, None] * share_MW)[:, :, None] * share_MW[:, None, :]
        cell_MWW = self._rank_MW[:, :, None] * num_ranks + self._rank_MW[:, None, :]
        found = np.bincount(cell_MWW.ravel(), weights=pair_MWW.ravel(), minlength=num_ranks**2)
        curvature_RR: Floats = np.diag(self._rows(share_MW) + 1 / STIFFNESS) - found.reshape(num_ranks, num_ranks)
        return curvature_RR
