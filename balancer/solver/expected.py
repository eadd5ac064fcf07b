"""What a placement is expected to do: load of ranks, balancedness, fan-out from pair counts.

Dimensions: E experts, R ranks, C slots of the widest rank, N nodes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled

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
    num_ranks = len(table_RC)
    cell_S = (table_RC + np.arange(0, num_ranks * num_experts, num_experts)[:, None])[table_RC >= 0]
    count_RE = np.bincount(cell_S, minlength=num_ranks * num_experts).reshape(num_ranks, num_experts)
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


def expected_fanout(shares_RE: Floats, group_R: Ints, share_E: Floats, pair_EE: Floats, likeness_EE: Floats) -> float:
    """Distinct groups of ranks that a token visits, estimated from loads and pair counts.

    A group that gets few of a token's experts is visited as inclusion-exclusion says, up to triples that are estimated
    from their pairs. Where it gets many, their number is taken as beta-binomial with the known mean and pair count. A
    pair counts 1 / sqrt(groups) for each of its experts that is in several groups, as in the search.

    Args:
        shares_RE: see ``replica_shares``.
        group_R: group of each rank: its own index for fan-out in ranks, its node for fan-out in nodes.
        share_E, pair_EE, likeness_EE: as in ``Problem``.
    """
    shares_GE = np.zeros((int(group_R.max()) + 1, len(share_E)))
    for rank, group in enumerate(group_R):
        shares_GE[group] += shares_RE[rank]
    mean_G = shares_GE @ share_E
    few_G = mean_G < FEW
    pairs_G, triples_G = _meetings(shares_GE > 0, few_G, pair_EE, likeness_EE)
    visited_G = _beta_binomial_visits(mean_G, 2 * pairs_G, max(round(float(share_E.sum())), 1))
    visited_G[few_G] = np.clip(mean_G - pairs_G, 0.0, None)[few_G] + TRIPLE_WEIGHT * triples_G[few_G]
    return float(np.minimum(visited_G, mean_G).sum())


@compiled
def _meetings(held_GE: Bools, few_G: Bools, pair_EE: Floats, likeness_EE: Floats) -> tuple[Floats, Floats]:
    """Pairs of a token's experts that meet in each group [G], and for the groups of ``few_G`` estimated triples."""
    num_groups, num_experts = held_GE.shape
    credit_E = np.zeros(num_experts)
    for e in range(num_experts):
        credit_E[e] = 1.0 / np.sqrt(max(int(held_GE[:, e].sum()), 1))
    pairs_G, triples_G = np.zeros(num_groups), np.zeros(num_groups)
    for group in range(num_groups):
        held = np.flatnonzero(held_GE[group])
        for i in range(len(held)):
            pair_E, like_E = pair_EE[held[i]], likeness_EE[held[i]]
            pairs = triples = 0.0
            for j in range(i):
                credit = credit_E[held[j]]
                pairs += credit * pair_E[held[j]]
                if few_G[group]:
                    both_E, inner = likeness_EE[held[j]], 0.0
                    for k in range(j):
                        inner += credit_E[held[k]] ** 2 * like_E[held[k]] * both_E[held[k]]
                    triples += credit * credit * like_E[held[j]] * inner
            pairs_G[group] += credit_E[held[i]] * pairs
            triples_G[group] += credit_E[held[i]] ** 2 * triples
    return pairs_G, triples_G


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
