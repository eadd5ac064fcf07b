"""Replica choice at routing, locality first under a load cap, as arithmetic on a batch of tokens.

Each token's experts with one replica fix the ranks and nodes that it visits anyway. Every other choice goes to the
replica that adds the least: ``node_weight`` for a new node, ``rank_weight`` for a new rank, and the price of the rank.
Prices rise while a rank is above its cap and fall below it, from one batch to the next: no source needs to know the
others' tokens of this very step. The same prices and batch give the same choice.

Dimensions: T tokens of a batch, K experts of a token, E experts, R ranks, N nodes.
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
    _in_node_RN: Bools = field(init=False)

    def __post_init__(self) -> None:
        self.price_R = np.zeros(len(self.node_R))
        self._in_node_RN = self.node_R[:, None] == np.arange(self.node_R.max() + 1)

    def choose(self, expert_TK: Ids, turn: int = 0) -> Ids:
        """Rank of each chosen expert, int64 [T, K], -1 where the expert is -1; then prices follow the load.

        ``turn`` numbers the batch.
        """
        chosen_TK = expert_TK >= 0
        options_TKR = self.holds_RE.T[expert_TK] & chosen_TK[..., None]
        rank_TK = np.where(chosen_TK, options_TKR.argmax(axis=2), -1)
        open_TK = options_TKR.sum(axis=2) > 1
        visited_TR = (options_TKR & ~open_TK[..., None]).any(axis=1)
        visited_TN = (visited_TR[..., None] & self._in_node_RN).any(axis=1)
        waiting_TR = (options_TKR & open_TK[..., None]).sum(axis=1)
        for k in range(expert_TK.shape[1]):
            rows = np.flatnonzero(open_TK[:, k])
            if len(rows) == 0:
                continue
            options_tR = options_TKR[rows, k]
            waiting_TR[rows] -= options_tR
            cost_tR = self.rank_weight * ~visited_TR[rows] + self.node_weight * ~visited_TN[rows][:, self.node_R]
            cost_tR -= LOOKAHEAD * self.rank_weight * ((waiting_TR[rows] > 0) & ~visited_TR[rows])
            cost_tR += self.price_R + DITHER * _scatter(rows + turn, k, len(self.node_R))
            rank_t = np.where(options_tR, cost_tR, np.inf).argmin(axis=1)
            rank_TK[rows, k] = rank_t
            visited_TR[rows, rank_t] = True
            visited_TN[rows, self.node_R[rank_t]] = True
        self._follow(rank_TK)
        return rank_TK

    def _follow(self, rank_TK: Ids) -> None:
        load_R = np.bincount(rank_TK[rank_TK >= 0], minlength=len(self.node_R))
        if load_R.sum() > 0:
            excess_R = load_R / load_R.mean() - self.cap
            step = self.pace * (self.rank_weight + self.node_weight)
            self.price_R = np.maximum(self.price_R + step * excess_R, 0.0)


def _scatter(token_t: Ids, k: int, num_ranks: int) -> Floats:
    """Numbers in [0, 1) that look random but depend on token, choice and rank alone (a golden-ratio sequence)."""
    step = (token_t[:, None] * 7 + k * 3 + np.arange(num_ranks)) * 0.6180339887498949
    return np.asarray(step % 1.0, np.float64)
