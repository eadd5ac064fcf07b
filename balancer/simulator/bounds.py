"""How good a placement can be at best: bounds that the simulator compares policies with.

Dimensions: E experts, K experts of a token, M experts of a rank, P sets of M experts.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.integer]


class NotSolvedError(RuntimeError):
    """The integer program was not solved to optimality in its time."""


def equal_split_bound(load_E: Floats, num_slots: int, num_ranks: int) -> float:
    """The highest balancedness that any placement with equal split can have: a rank carries the mean at least, and the
    largest share of a replica under min-max replication."""
    replicas_E = np.ones(len(load_E))
    for _ in range(num_slots - len(load_E)):
        open_E = replicas_E < num_ranks
        if not open_E.any():
            break
        replicas_E[np.argmax(np.where(open_E, load_E / replicas_E, -1))] += 1
    mean = load_E.sum() / num_ranks
    return float(mean / max(mean, (load_E / replicas_E).max()))


def least_fanout(topk_TK: Ids, num_experts: int, per_rank: int, cap: float, time_limit_s: float = 600.0) -> float:
    """Fewest ranks a token that any placement without replicas visits, on these very tokens.

    Set partitioning: one variable for every set of ``per_rank`` experts whose load (tokens) is at most ``cap``, its
    cost the exact number of tokens that visit it, every expert in one set. Needs scipy (HiGHS).

    Args:
        topk_TK: every token chooses K experts.

    Raises:
        NotSolvedError: not solved to optimality in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csc_matrix

    sets_PM = combinadic_sets(num_experts, per_rank).astype(np.int64)
    visits_P, load_P = _visits(topk_TK.astype(np.int64), num_experts, sets_PM)
    fits_P = load_P <= cap * (1 + 1e-9)
    sets_PM, visits_P = sets_PM[fits_P], visits_P[fits_P]
    columns = np.repeat(np.arange(len(sets_PM)), per_rank)
    covers = csc_matrix((np.ones(sets_PM.size), (sets_PM.ravel(), columns)), shape=(num_experts, len(sets_PM)))
    found = milp(
        visits_P,
        constraints=LinearConstraint(covers, 1, 1),
        bounds=Bounds(0, 1),
        integrality=np.ones(len(visits_P)),
        options={"time_limit": time_limit_s},
    )
    if found.status != 0:
        raise NotSolvedError(f"the integer program ended with: {found.message}")
    return float(found.fun) / len(topk_TK)


def combinadic_sets(num_experts: int, top_k: int) -> NDArray[np.int16]:
    """int16 [C(num_experts, top_k), top_k]: row i is the ascending set whose combinadic rank is i.

    The rank of a < b < c < d is C(a,1) + C(b,2) + C(c,3) + C(d,4).
    """
    remaining = np.arange(comb(num_experts, top_k))
    sets_NK = np.empty((len(remaining), top_k), np.int16)
    for k in range(top_k, 0, -1):
        binomial = np.array([comb(member, k) for member in range(num_experts + 1)])
        member = np.searchsorted(binomial, remaining, side="right") - 1
        sets_NK[:, k - 1] = member
        remaining = remaining - binomial[member]
    return sets_NK


def _visits(topk_TK: NDArray[np.int64], num_experts: int, sets_PM: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Tokens that choose at least one expert of each set, by inclusion-exclusion over its subsets; and its load."""
    ordered_TK = np.sort(topk_TK, axis=1)
    total_P, load_P = np.zeros(len(sets_PM)), np.zeros(len(sets_PM))
    for size in range(1, min(topk_TK.shape[1], sets_PM.shape[1]) + 1):
        counts = np.zeros(comb(num_experts, size))
        for chosen in combinations(range(topk_TK.shape[1]), size):
            counts += np.bincount(_rank_of(ordered_TK[:, chosen]), minlength=len(counts))
        within_P = sum(counts[_rank_of(sets_PM[:, chosen])] for chosen in combinations(range(sets_PM.shape[1]), size))
        total_P += within_P if size % 2 else -within_P
        if size == 1:
            load_P += within_P
    return total_P, load_P


def _rank_of(ascending_PM: NDArray[np.int64]) -> NDArray[np.int64]:
    """Combinadic rank of ascending sets: C(a,1) + C(b,2) + ..."""
    largest = int(ascending_PM.max()) + 1
    rank_P = np.zeros(len(ascending_PM), np.int64)
    for position in range(ascending_PM.shape[1]):
        binomial = np.array([comb(member, position + 1) for member in range(largest)])
        rank_P += binomial[ascending_PM[:, position]]
    return rank_P
