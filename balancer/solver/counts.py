"""Loads and pair counts from tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 8192


def count_routing(topk_TK: NDArray[np.integer], num_experts: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens that chose each expert [E], and tokens that chose both of two experts [E, E] with diagonal 0; float64.

    Ids from 0 to ``num_experts`` - 1, -1 = none.
    """
    pair_EE = np.zeros((num_experts, num_experts))
    for start in range(0, len(topk_TK), CHUNK):
        chunk_TK = topk_TK[start : start + CHUNK]
        chosen_TE = np.zeros((len(chunk_TK), num_experts + 1), np.float32)  # the last column takes the -1
        np.put_along_axis(chosen_TE, chunk_TK.astype(np.int64), 1.0, axis=1)
        pair_EE += chosen_TE[:, :-1].T @ chosen_TE[:, :-1]
    load_E = pair_EE.diagonal().copy()
    np.fill_diagonal(pair_EE, 0.0)
    return load_E, pair_EE
