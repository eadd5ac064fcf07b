"""Load balance of one layer: how many replicas, where they go, swaps that lower the fullest rank.

Dimensions: E experts, R ranks, C slots of the widest rank. Tables are int32 [R, C], -1 = empty; loads are float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


@compiled
def min_max_replicas(load_E: Floats, num_slots: int, num_ranks: int, floor_E: Ints) -> Ints:
    """Replicas of each expert such that the largest load of a replica is as small as it can be.

    ``floor_E`` replicas each; then every further slot goes to the expert whose replicas carry most. No expert gets more
    replicas than there are ranks.
    """
    num_experts = len(load_E)
    replicas_E = floor_E.copy()
    share_E = load_E / replicas_E
    for _ in range(num_slots - replicas_E.sum()):
        best, most = -1, -1.0
        for e in range(num_experts):
            if share_E[e] > most and replicas_E[e] < num_ranks:
                best, most = e, share_E[e]
        if best == -1:
            break
        replicas_E[best] += 1
        share_E[best] = load_E[best] / replicas_E[best]
    return replicas_E


@compiled
def _holds(slots_C: Ints, expert: int) -> bool:
    return bool((slots_C == expert).any())


@compiled
def pack(load_E: Floats, replicas_E: Ints, room_R: Ints, width: int) -> Ints:
    """Largest replica first, each to the least loaded rank that has room and does not hold the expert yet.

    Where only ranks that hold the expert have room, a full rank hands one of its experts on to make way. What even
    that cannot place is dropped, and the slot goes to the expert with the heaviest replicas that the rank lacks:
    every expert is placed and no rank holds one twice, whatever ``room_R`` is.
    """
    num_experts, num_ranks = len(load_E), len(room_R)
    table_RC = np.full((num_ranks, width), -1, np.int32)
    used_R = np.zeros(num_ranks, np.int32)
    load_R = np.zeros(num_ranks, np.float64)
    placed_E = np.zeros(num_experts, np.int32)
    share_E = load_E / replicas_E
    for e in np.argsort(-share_E, kind="mergesort"):
        for _ in range(replicas_E[e]):
            best = -1
            for r in range(num_ranks):
                if used_R[r] < room_R[r] and (best == -1 or load_R[r] < load_R[best]) and not _holds(table_RC[r], e):
                    best = r
            if best == -1:
                best = _make_way(table_RC, used_R, load_R, room_R, share_E, e)
            if best == -1:
                break
            table_RC[best, used_R[best]] = e
            used_R[best] += 1
            load_R[best] += share_E[e]
            placed_E[e] += 1
    for r in range(num_ranks):
        while used_R[r] < min(room_R[r], num_experts):
            best = -1
            for e in range(num_experts):
                heavier = best == -1 or load_E[e] / placed_E[e] > load_E[best] / placed_E[best]
                if heavier and not _holds(table_RC[r], e):
                    best = e
            table_RC[r, used_R[r]] = best
            used_R[r] += 1
            placed_E[best] += 1
    return table_RC


@compiled
def _make_way(table_RC: Ints, used_R: Ints, load_R: Floats, room_R: Ints, share_E: Floats, expert: int) -> int:
    """A rank without ``expert`` that has room after handing an expert to a rank with room; -1 = there is none."""
    for full in range(len(room_R)):
        if _holds(table_RC[full], expert):
            continue
        for to in range(len(room_R)):
            if used_R[to] >= room_R[to]:
                continue
            for c in range(used_R[full]):
                handed = table_RC[full, c]
                if not _holds(table_RC[to], handed):
                    table_RC[to, used_R[to]] = handed
                    used_R[to] += 1
                    load_R[to] += share_E[handed]
                    used_R[full] -= 1
                    table_RC[full, c] = table_RC[full, used_R[full]]
                    table_RC[full, used_R[full]] = -1
                    load_R[full] -= share_E[handed]
                    return full
    return -1


@compiled
def even_split_load(table_RC: Ints, load_E: Floats) -> Floats:
    """Load of each rank [R] when an expert's load is split equally over its replicas."""
    replicas_E = np.zeros(len(load_E), np.int32)
    for r in range(table_RC.shape[0]):
        for c in range(table_RC.shape[1]):
            if table_RC[r, c] >= 0:
                replicas_E[table_RC[r, c]] += 1
    load_R = np.zeros(table_RC.shape[0], np.float64)
    for r in range(table_RC.shape[0]):
        for c in range(table_RC.shape[1]):
            e = table_RC[r, c]
            if e >= 0:
                load_R[r] += load_E[e] / replicas_E[e]
    return load_R


@compiled
def level(table_RC: Ints, load_E: Floats, tolerance: float, max_swaps: int) -> int:
    """Swap experts of the fullest rank with those of others, in place, while the fullest gets lighter.

    Each step takes the swap after which the fuller of the two ranks is lightest. Stops when the fullest rank is within
    ``tolerance`` (relative) of the mean. Returns the number of swaps.
    """
    num_ranks, width = table_RC.shape
    replicas_E = np.zeros(len(load_E), np.int32)
    holds_RE = np.zeros((num_ranks, len(load_E)), np.bool_)
    for r in range(num_ranks):
        for c in range(width):
            if table_RC[r, c] >= 0:
                replicas_E[table_RC[r, c]] += 1
                holds_RE[r, table_RC[r, c]] = True
    share_E = load_E / replicas_E
    load_R = even_split_load(table_RC, load_E)
    goal = load_R.mean() * (1 + tolerance)
    for swaps in range(max_swaps):
        top = int(np.argmax(load_R))
        best, best_c, best_r, best_d = load_R[top] * (1 - 1e-9), -1, -1, -1
        if load_R[top] <= goal:
            return swaps
        for r in range(num_ranks):
            if load_R[r] >= best:
                continue
            for c in range(width):
                e = table_RC[top, c]
                if e < 0 or holds_RE[r, e]:
                    continue
                for d in range(width):
                    f = table_RC[r, d]
                    if f < 0:
                        continue
                    less = share_E[e] - share_E[f]
                    fuller = max(load_R[top] - less, load_R[r] + less)
                    if less > 0 and fuller < best and not holds_RE[top, f]:
                        best, best_c, best_r, best_d = fuller, c, r, d
        if best_r == -1:
            return swaps
        e, f = table_RC[top, best_c], table_RC[best_r, best_d]
        table_RC[top, best_c], table_RC[best_r, best_d] = f, e
        holds_RE[top, e], holds_RE[top, f] = False, True
        holds_RE[best_r, f], holds_RE[best_r, e] = False, True
        load_R[top] -= share_E[e] - share_E[f]
        load_R[best_r] += share_E[e] - share_E[f]
    return max_swaps
