"""What a placement is expected to do: load of ranks, balancedness, fan-out from pair counts.

Dimensions: E experts, R ranks, C slots of the widest rank, N nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
TRIPLE_WEIGHT = 0.5
"""Of estimated triples in inclusion-exclusion: fitted on gpt-oss-20b, 0.3 to 0.57 from layer to layer."""
FEW = 0.75
"""Experts of a token in a group up to which inclusion-exclusion with three terms is closer than a beta-binomial."""


def held_experts(table_RC: Ints, num_experts: int) -> Bools:
    """Which rank holds which expert, bool [R, E]."""
    held_RE = np.zeros((len(table_RC), num_experts), np.bool_)
    rank, slot = np.nonzero(table_RC >= 0)
    held_RE[rank, table_RC[rank, slot]] = True
    return held_RE


def replica_shares(table_RC: Ints, num_experts: int) -> Floats:
    """Share of each expert's load that each rank gets when replicas share equally, float64 [R, E]; columns sum to 1."""
    count_RE = np.zeros((len(table_RC), num_experts))
    rank, slot = np.nonzero(table_RC >= 0)
    np.add.at(count_RE, (rank, table_RC[rank, slot]), 1.0)
    shares_RE: Floats = count_RE / count_RE.sum(axis=0)
    return shares_RE


def rank_loads(table_RC: Ints, load_E: Floats) -> Floats:
    """Load of each rank [R] when replicas share equally, in the units of ``load_E``."""
    loads_R: Floats = replica_shares(table_RC, len(load_E)) @ load_E
    return loads_R


def balancedness(load_R: Floats) -> float:
    """Mean over maximum; 1 where there is no load."""
    fullest = load_R.max()
    return float(load_R.mean() / fullest) if fullest > 0 else 1.0


def experts_per_token(load_E: Floats, pair_EE: Floats) -> float:
    """K from the counts alone: of every chosen expert, each token has K - 1 pairs. Diagonal 0."""
    total = load_E.sum()
    return 1.0 + float(pair_EE.sum() / total) if total > 0 else 1.0


def likeness(load_E: Floats, pair_EE: Floats) -> Floats:
    """Pair counts over the geometric mean of the two experts' own counts."""
    root_E = np.sqrt(np.maximum(load_E, 1e-300))
    likeness_EE: Floats = np.where(load_E > 0, pair_EE / root_E, 0.0) / root_E[:, None]
    return np.where(load_E[:, None] > 0, likeness_EE, 0.0)


def expected_fanout(table_RC: Ints, group_R: Ints, load_E: Floats, pair_EE: Floats) -> float:
    """Distinct groups of ranks that a token visits, estimated from loads and pair counts (diagonal 0).

    A group that gets few of a token's experts is visited as inclusion-exclusion says, up to triples that are estimated
    from their pairs. Where it gets many, their number is taken as beta-binomial with the known mean and pair count. A
    pair counts 1 / sqrt(groups) for each of its experts that is in several groups, as in the search.

    Args:
        group_R: group of each rank: its own index for fan-out in ranks, its node for fan-out in nodes.
    """
    num_experts = len(load_E)
    per_token = experts_per_token(load_E, pair_EE)
    tokens = load_E.sum() / per_token
    if tokens == 0:
        return 0.0
    share_GE = np.zeros((int(group_R.max()) + 1, num_experts))
    np.add.at(share_GE, group_R, replica_shares(table_RC, num_experts))
    held_GE = (share_GE > 0).astype(np.float64)
    credit_E = 1.0 / np.sqrt(np.maximum(held_GE.sum(axis=0), 1.0))
    met_EE = pair_EE * np.outer(credit_E, credit_E) / tokens
    mean_G = share_GE @ load_E / tokens
    pairs_G = np.einsum("ge,eg->g", held_GE, met_EE @ held_GE.T)
    few_G = mean_G < FEW
    visited_G = _beta_binomial_visits(mean_G, pairs_G, max(round(per_token), 1))
    if few_G.any():
        like_EE = likeness(load_E, met_EE * tokens)
        members = [np.flatnonzero(held_E) for held_E in held_GE[few_G]]
        blocks = [like_EE[np.ix_(experts, experts)] for experts in members]
        triples_G = np.array([np.einsum("ij,ji->", block @ block, block) / 6 for block in blocks])
        visited_G[few_G] = np.clip(mean_G - pairs_G / 2, 0.0, None)[few_G] + TRIPLE_WEIGHT * triples_G
    return float(np.minimum(visited_G, mean_G).sum())


def _beta_binomial_visits(mean_G: Floats, pairs_G: Floats, top_k: int) -> Floats:
    """1 - P(0) over ``top_k`` trials with this mean and this mean of X(X-1)."""
    if top_k == 1:
        return mean_G.copy()
    p_G = np.clip(mean_G / top_k, 1e-12, 1 - 1e-12)
    both_G = pairs_G / (top_k * (top_k - 1))
    # Correlation of two choices of a token; below 0 they avoid each other, down to where the formula stays positive.
    lowest_G = -0.9 * np.minimum(p_G, 1 - p_G) / (top_k - 1)
    rho_G = np.clip((both_G - p_G**2) / (p_G * (1 - p_G)), lowest_G, 1 - 1e-9)
    none_G = np.ones_like(p_G)
    for trial in range(top_k):
        none_G *= ((1 - p_G) * (1 - rho_G) + trial * rho_G) / (1 - rho_G + trial * rho_G)
    return 1 - none_G
