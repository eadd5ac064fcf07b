"""Joint search of one layer: fewer ranks and nodes a token under a hard load cap, within a budget of changed slots.

Experts that a token chooses together cost it one visit less when they share a rank (or a node). From pair counts
alone, with p the share of tokens that choose an expert or a set of them, the share that visits a rank is about

    sum of p_i - sum of p_ij + triple_weight * sum of p_ij p_ik p_jk / (p_i p_j p_k)

over the experts, pairs and triples of the rank: inclusion-exclusion with Kirkwood's superposition for the triples and
a factor below 1 for the alternating rest. For nodes, whose sets are too large for that series, only the pairs count.
A pair of replicated experts counts less wherever it meets (``SearchState.credit_E``).

The search is simulated annealing over swaps of two slots and replacements of one replica, then descent; an empty slot
is filled where that pays at once. Its random
numbers are its own: the same input gives the same output.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled
from expertmesh.balancer.solver.search_state import (
    SearchState,
    clear,
    fill,
    follow_swap,
    refresh_triples,
    replace,
    swap,
    triples,
)

Seed = NDArray[np.uint64]
TINY = 1e-12


class Goal(NamedTuple):
    """What a change is worth, in shares of a visit per token."""

    cap: float
    """load that no rank may exceed; where one does at the start, the excess may only shrink"""
    fixed_cap: float
    """the same for the load of experts without a second replica: the rest can be shifted when traffic drifts"""
    rank_weight: float
    node_weight: float
    triple_weight: float
    excess_weight: float
    """worth of one unit of load less above the cap"""
    move_cost: float
    """what a change of one slot has to bring"""
    hard: bool
    budget: int
    """slots that may hold what their rank did not hold before"""


@compiled
def _swap_gain(s: SearchState, goal: Goal, r: int, e: int, q: int, f: int) -> float:
    """What pairs save more when rank r has f and rank q has e instead of the other way round."""
    credit_e, credit_f = s.credit_E[e], s.credit_E[f]
    meeting = credit_e * credit_f * s.pair_EE[e, f]
    gain = credit_e * (s.near_RE[q, e] - s.near_RE[r, e]) + credit_f * (s.near_RE[r, f] - s.near_RE[q, f])
    gain = goal.rank_weight * (gain - 2 * meeting)
    n, m = s.node_R[r], s.node_R[q]
    if n != m:
        node_gain = 0.0
        e_leaves, f_leaves = s.count_NE[n, e] == 1, s.count_NE[m, f] == 1
        if e_leaves:
            node_gain -= credit_e * s.near_NE[n, e]
        if f_leaves:
            node_gain -= credit_f * s.near_NE[m, f]
        if s.count_NE[m, e] == 0:
            node_gain += credit_e * s.near_NE[m, e] - (meeting if f_leaves else 0.0)
        if s.count_NE[n, f] == 0:
            node_gain += credit_f * s.near_NE[n, f] - (meeting if e_leaves else 0.0)
        gain += goal.node_weight * node_gain
    return float(gain)


@compiled
def _savings(s: SearchState, goal: Goal, e: int, f: int) -> float:
    """What the pairs of ``e`` and of ``f`` save, the pair (e, f) counted once, and what triples take back."""
    return _one_savings(s, goal, e, -1) + _one_savings(s, goal, f, e)


@compiled
def _one_savings(s: SearchState, goal: Goal, e: int, skip: int) -> float:
    on_ranks = in_nodes = 0.0
    shared = s.credit_E[skip] * s.pair_EE[e, skip] if skip >= 0 else 0.0
    for k in range(s.replicas_E[e]):
        r = s.homes_ER[e, k]
        on_ranks += s.near_RE[r, e]
        if skip >= 0 and s.holds_RE[r, skip]:
            on_ranks -= shared
    for n in range(s.count_NE.shape[0]):
        if s.count_NE[n, e] > 0:
            in_nodes += s.near_NE[n, e]
            if skip >= 0 and s.count_NE[n, skip] > 0:
                in_nodes -= shared
    return float(s.credit_E[e] * (goal.rank_weight * on_ranks + goal.node_weight * in_nodes))


@compiled
def _excess(s: SearchState, goal: Goal) -> float:
    total = 0.0
    for r in range(len(s.load_R)):
        total += max(s.load_R[r] - goal.cap, 0.0) + max(s.fixed_R[r] - goal.fixed_cap, 0.0)
    return total


@compiled
def _swap_load(s: SearchState, goal: Goal, r: int, e: int, q: int, f: int) -> tuple[float, float, float]:
    """Load and fixed load that rank r sheds to q when it gets f for e, and the excess over the caps that this adds."""
    less = s.load_E[e] / s.replicas_E[e] - s.load_E[f] / s.replicas_E[f]
    over = max(s.load_R[r] - less - goal.cap, 0.0) + max(s.load_R[q] + less - goal.cap, 0.0)
    over -= max(s.load_R[r] - goal.cap, 0.0) + max(s.load_R[q] - goal.cap, 0.0)
    fixed_less = (s.load_E[e] if s.replicas_E[e] == 1 else 0.0) - (s.load_E[f] if s.replicas_E[f] == 1 else 0.0)
    over += max(s.fixed_R[r] - fixed_less - goal.fixed_cap, 0.0) + max(s.fixed_R[q] + fixed_less - goal.fixed_cap, 0.0)
    over -= max(s.fixed_R[r] - goal.fixed_cap, 0.0) + max(s.fixed_R[q] - goal.fixed_cap, 0.0)
    return less, fixed_less, over


@compiled
def _swap_slots(s: SearchState, goal: Goal, room: int, floor: float, r: int, c: int, q: int, d: int) -> int:
    """Swap two slots if that is worth ``floor`` or more; returns the slots changed, -99 = not swapped."""
    e, f = s.table_RC[r, c], s.table_RC[q, d]
    less, fixed_less, over = _swap_load(s, goal, r, e, q, f)
    more = int(not s.was_RE[r, f]) + int(not s.was_RE[q, e]) - int(not s.was_RE[r, e]) - int(not s.was_RE[q, f])
    if (goal.hard and over > TINY) or more > max(room, 0):
        return -99
    floor += goal.excess_weight * over + goal.move_cost * more
    gain = _swap_gain(s, goal, r, e, q, f)
    triple_weight = goal.triple_weight * goal.rank_weight
    if triple_weight > 0:
        gain += triple_weight * (s.triples_RC[r, c] + s.triples_RC[q, d])
        if gain >= floor:
            gain -= triple_weight * (triples(s, r, c, f) + triples(s, q, d, e))
    if gain < floor:
        return -99
    swap(s, r, c, q, d)
    follow_swap(s, r, q, e, f)
    s.load_R[r] -= less
    s.load_R[q] += less
    s.fixed_R[r] -= fixed_less
    s.fixed_R[q] += fixed_less
    return more


@compiled
def _replace_slot(s: SearchState, goal: Goal, room: int, floor: float, r: int, c: int, f: int) -> int:
    """Put ``f`` in the slot of a replica if that is worth ``floor`` or more; returns as ``_swap_slots``."""
    e = s.table_RC[r, c]
    more = int(not s.was_RE[r, f]) - int(not s.was_RE[r, e])
    if more > max(room, 0):
        return -99
    over = -_excess(s, goal)
    gain = -_savings(s, goal, e, f)
    freed = s.triples_RC[r, c]
    replace(s, r, c, f)
    over += _excess(s, goal)
    gain += _savings(s, goal, e, f)
    gain += goal.triple_weight * goal.rank_weight * (freed - s.triples_RC[r, c])
    if (goal.hard and over > TINY) or gain < floor + goal.excess_weight * over + goal.move_cost * more:
        replace(s, r, c, e)
        return -99
    return more


@compiled
def _fill_slot(s: SearchState, goal: Goal, room: int, floor: float, r: int, c: int, f: int) -> int:
    """Put a replica of ``f`` into an empty slot if that is worth ``floor`` or more; returns as ``_swap_slots``."""
    more = int(not s.was_RE[r, f])
    if more > max(room, 0):
        return -99
    over, gain = -_excess(s, goal), -_one_savings(s, goal, f, -1)
    fill(s, r, c, f)
    over += _excess(s, goal)
    gain += _one_savings(s, goal, f, -1) - goal.triple_weight * goal.rank_weight * s.triples_RC[r, c]
    if (goal.hard and over > TINY) or gain < floor + goal.excess_weight * over + goal.move_cost * more:
        clear(s, r, c)
        return -99
    return more


@compiled
def _random(seed: Seed) -> float:
    """The next number in [0, 1) of xorshift64* (Vigna 2016)."""
    x = seed[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    seed[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@compiled
def count_moved(s: SearchState) -> int:
    """Slots that hold what their rank did not hold before."""
    moved = 0
    for r in range(s.table_RC.shape[0]):
        for c in range(s.table_RC.shape[1]):
            if s.table_RC[r, c] >= 0 and not s.was_RE[r, s.table_RC[r, c]]:
                moved += 1
    return moved


@compiled
def anneal(
    s: SearchState, goal: Goal, proposals: int, hot: float, cold: float, replace_share: float, seed: Seed
) -> int:
    """Search in place; returns the slots moved. ``hot`` and ``cold``: the temperature at the start and at the end,
    in the units of ``goal``; with ``hot`` 0 nothing that makes it worse is accepted."""
    num_ranks, width = s.table_RC.shape
    moved = count_moved(s)
    temperature = hot
    cooling = (cold / hot) ** (1.0 / proposals) if hot > 0 else 0.0
    for _ in range(proposals):
        r, c = int(_random(seed) * num_ranks), int(_random(seed) * width)
        temperature *= cooling
        floor = temperature * np.log(1.0 - _random(seed)) if temperature > 0 else TINY
        e = s.table_RC[r, c]
        more = -99
        if e < 0:
            f = int(_random(seed) * len(s.load_E))
            if c < s.room_R[r] and not s.holds_RE[r, f]:
                more = _fill_slot(s, goal, goal.budget - moved, max(floor, TINY), r, c, f)
        elif s.replicas_E[e] > s.floor_E[e] and _random(seed) < replace_share:
            f = int(_random(seed) * len(s.load_E))
            if not s.holds_RE[r, f]:
                more = _replace_slot(s, goal, goal.budget - moved, floor, r, c, f)
        else:
            q, d = int(_random(seed) * num_ranks), int(_random(seed) * width)
            f = s.table_RC[q, d]
            if f < 0 or s.holds_RE[q, e] or s.holds_RE[r, f]:
                continue
            # Most proposals end here: a call costs more than this bound.
            _, _, over = _swap_load(s, goal, r, e, q, f)
            if goal.hard and over > TINY:
                continue
            gain = s.credit_E[e] * (s.near_RE[q, e] - s.near_RE[r, e])
            gain += s.credit_E[f] * (s.near_RE[r, f] - s.near_RE[q, f])
            gain += goal.triple_weight * (s.triples_RC[r, c] + s.triples_RC[q, d])
            gain *= goal.rank_weight
            n, m = s.node_R[r], s.node_R[q]
            if n != m:
                if s.count_NE[m, e] == 0:
                    gain += goal.node_weight * s.credit_E[e] * s.near_NE[m, e]
                if s.count_NE[n, f] == 0:
                    gain += goal.node_weight * s.credit_E[f] * s.near_NE[n, f]
                if s.count_NE[n, e] == 1:
                    gain -= goal.node_weight * s.credit_E[e] * s.near_NE[n, e]
                if s.count_NE[m, f] == 1:
                    gain -= goal.node_weight * s.credit_E[f] * s.near_NE[m, f]
            if gain < floor + goal.excess_weight * over:
                continue
            more = _swap_slots(s, goal, goal.budget - moved, floor, r, c, q, d)
        if more != -99:
            moved += more
    return moved


@compiled
def total_savings(s: SearchState, goal: Goal) -> float:
    """Visits per token, weighted, that the placement saves against every expert on a rank and a node of its own."""
    triples_sum = 0.0
    for r in range(s.table_RC.shape[0]):
        refresh_triples(s, r)
        for c in range(s.table_RC.shape[1]):
            triples_sum += s.triples_RC[r, c]
    total = 0.0
    for e in range(len(s.load_E)):
        total += _one_savings(s, goal, e, -1) / 2
    return total - goal.rank_weight * goal.triple_weight * triples_sum / 3
