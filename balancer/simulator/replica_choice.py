"""Replica choice at routing, locality first under a load cap, as arithmetic on a batch of tokens.

Each token's experts with one replica fix the ranks and nodes that it visits anyway. Every other choice goes to the
replica that adds the least: ``node_weight`` for a new node, ``rank_weight`` for a new rank, and the price of the rank.
Prices rise while a rank is above its cap and fall below it, from one batch to the next: no source needs to know the
others' tokens of this very step. The same prices and batch give the same choice.

Dimensions: T tokens of a batch, K experts of a token, E experts, R ranks, W replicas of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LOOKAHEAD = 0.6
"""Of a new rank's cost, forgiven where another open choice of the token could follow."""
DITHER = 0.1
"""Spread of equal costs over tokens, so that a price moves a part of them and not all at once."""

ROWS_TO_TRUST = 32
"""Tokens of a rank in a batch, on average, below which prices move more slowly: what looks like load is chance."""


@dataclass(kw_only=True, slots=True)
class ReplicaChooser:
    """One layer's choice of ranks; ``price_R`` carries over from batch to batch.

    Args:
        holds_RE: which rank holds which expert.
        cap: load that a rank may have before its price rises, in units of the mean.
        pace: price for an excess of the whole mean load in one batch, in units of the weights' sum.
    """

    holds_RE: Bools
    node_R: NDArray[np.int32]
    rank_weight: float = 0.5
    node_weight: float = 0.25
    cap: float = 0.99
    pace: float = 0.8
    price_R: Floats = field(init=False)
    _holder_EW: NDArray[np.int64] = field(init=False)
    _replicas_E: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.price_R = np.zeros(len(self.node_R))
        self._replicas_E = self.holds_RE.sum(axis=0)
        self._holder_EW = np.full((self.holds_RE.shape[1], max(int(self._replicas_E.max()), 1)), -1)
        expert, rank = np.nonzero(self.holds_RE.T)
        starts_E = np.cumsum(self._replicas_E) - self._replicas_E
        self._holder_EW[expert, np.arange(len(expert)) - starts_E[expert]] = rank

    def choose(self, expert_TK: Ids, turn: int = 0) -> Ids:
        """Rank of each chosen expert, int64 [T, K], -1 where the expert is -1; then prices follow the load.

        ``turn`` numbers the batch.
        """
        replicas_TK = np.where(expert_TK >= 0, self._replicas_E[expert_TK], 0)
        rank_TK = np.where(replicas_TK > 0, self._holder_EW[expert_TK, 0], -1)
        open_TK = replicas_TK > 1
        rank_TK[open_TK] = -1
        for k in range(expert_TK.shape[1]):
            rows = np.flatnonzero(open_TK[:, k])
            if len(rows) == 0:
                continue
            width = int(replicas_TK[rows, k].max())
            option_tW = self._holder_EW[expert_TK[rows, k], :width]
            visited_tW = (option_tW[:, :, None] == rank_TK[rows, None, :]).any(axis=2)
            there_tK = np.where(rank_TK[rows] >= 0, self.node_R[rank_TK[rows]], -1)
            near_tW = (self.node_R[option_tW][:, :, None] == there_tK[:, None, :]).any(axis=2)
            cost_tW = self.rank_weight * ~visited_tW + self.node_weight * ~near_tW
            followed_tW = self._followed(option_tW, expert_TK[rows, k + 1 :], open_TK[rows, k + 1 :])
            cost_tW -= LOOKAHEAD * self.rank_weight * (followed_tW & ~visited_tW)
            cost_tW += self.price_R[option_tW] + DITHER * _scatter(rows + turn, k, option_tW)
            best_t = np.where(option_tW >= 0, cost_tW, np.inf).argmin(axis=1)
            rank_TK[rows, k] = option_tW[np.arange(len(rows)), best_t]
        self._follow(rank_TK)
        return rank_TK

    def _followed(self, option_tW: Ids, later_tK: Ids, open_tK: Bools) -> Bools:
        """Which options hold another expert of the token that is still to be decided on."""
        followed_tW = np.zeros(option_tW.shape, np.bool_)
        for k in range(later_tK.shape[1]):
            followed_tW |= self.holds_RE[option_tW, later_tK[:, k, None]] & open_tK[:, k, None]
        return followed_tW

    def _follow(self, rank_TK: Ids) -> None:
        load_R = np.bincount(rank_TK[rank_TK >= 0], minlength=len(self.node_R))
        if load_R.sum() > 0:
            excess_R = load_R / load_R.mean() - self.cap
            certain = min(load_R.mean() / ROWS_TO_TRUST, 1.0)
            step = self.pace * certain * (self.rank_weight + self.node_weight)
            self.price_R = np.maximum(self.price_R + step * excess_R, 0.0)


def _scatter(token_t: Ids, k: int, rank_tW: Ids) -> Floats:
    """Numbers in [0, 1) that look random but depend on token, choice and rank alone (a golden-ratio sequence)."""
    return np.asarray((token_t[:, None] * 7 + k * 3 + rank_tW) * 0.6180339887498949 % 1.0, np.float64)
