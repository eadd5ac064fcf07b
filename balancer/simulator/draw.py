"""Tokens for traces that have loads alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.errors import UserError

Floats = NDArray[np.float64]
Ids = NDArray[np.int16]
GROUP = 16
"""Tokens that share a random order of the experts."""


def draw_tokens(load_E: Floats, top_k: int, num_tokens: int, seed: int) -> Ids:
    """int16 [tokens, K]: every token chooses ``top_k`` distinct experts, each expert with a probability proportional to
    its load, at most 1, and beside that without regard to each other: co-activation is what chance makes it.

    Systematic sampling with unequal probabilities over experts in random order (Madow 1949).

    Raises:
        UserError: fewer experts with a load than a token chooses.
    """
    if (load_E > 0).sum() < top_k:
        found = f"{(load_E > 0).sum()} experts of a layer have a load, a token of the model chooses {top_k}"
        raise UserError("load", found, "give the --model that the loads are of")
    rng = np.random.default_rng(seed)
    chance_E = _chances(load_E, top_k)
    tokens = []
    for start in range(0, num_tokens, GROUP):
        order_E = rng.permutation(len(load_E))
        edges_E = np.cumsum(chance_E[order_E])
        points_TK = (rng.random((min(GROUP, num_tokens - start), 1)) + np.arange(top_k)) * edges_E[-1] / top_k
        tokens.append(order_E[np.minimum(np.searchsorted(edges_E, points_TK, side="right"), len(load_E) - 1)])
    return np.concatenate(tokens).astype(np.int16)


def _chances(load_E: Floats, top_k: int) -> Floats:
    """Probability of each expert to be among the chosen; sums to ``top_k``."""
    certain_E = np.zeros(len(load_E), np.bool_)
    while True:
        chance_E = np.where(certain_E, 1.0, 0.0)
        left = top_k - certain_E.sum()
        open_E = np.where(certain_E, 0.0, load_E)
        if left > 0:
            chance_E += left * open_E / open_E.sum()
        above_E = (chance_E > 1.0) & ~certain_E
        if not above_E.any():
            return np.minimum(chance_E, 1.0)
        certain_E |= above_E
