"""Names for the ranks of a new placement such that as little as possible has to be loaded.

Ranks of equal room are interchangeable within a node, and so are nodes of the same ranks: which new content goes to
which old place is an assignment problem on how much of it is there already, solved exactly.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled
from expertmesh.balancer.solver.expected import held_experts
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
FORBIDDEN = 1e9


@compiled
def assign(cost_IJ: Floats) -> NDArray[np.int64]:
    """Column of each row of a square matrix such that the costs sum to the least: shortest augmenting paths, O(n³)
    (Jonker and Volgenant 1987)."""
    n = len(cost_IJ)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, np.int64)  # of each column; index 0 stands for "none"
    before = np.zeros(n + 1, np.int64)
    for i in range(1, n + 1):
        row_of[0] = i
        j = 0
        nearest = np.full(n + 1, np.inf)
        done = np.zeros(n + 1, np.bool_)
        while row_of[j] != 0:
            done[j] = True
            row, step, following = row_of[j], np.inf, 0
            for k in range(1, n + 1):
                if not done[k]:
                    reduced = cost_IJ[row - 1, k - 1] - row_price[row] - column_price[k]
                    if reduced < nearest[k]:
                        nearest[k], before[k] = reduced, j
                    if nearest[k] < step:
                        step, following = nearest[k], k
            for k in range(n + 1):
                if done[k]:
                    row_price[row_of[k]] += step
                    column_price[k] -= step
                else:
                    nearest[k] -= step
            j = following
        while j != 0:
            row_of[j] = row_of[before[j]]
            j = before[j]
    column_of = np.empty(n, np.int64)
    for k in range(1, n + 1):
        column_of[row_of[k] - 1] = k - 1
    return column_of


def relabel(table_RC: Ints, current_RC: Ints, topology: Topology, num_experts: int) -> Ints:
    """``table_RC`` with its ranks renamed and its slots reordered to match ``current_RC`` as far as that goes."""
    new_RE, old_RE = held_experts(table_RC, num_experts), held_experts(current_RC, num_experts)
    cost_RR = -(new_RE.astype(np.float64) @ old_RE.T.astype(np.float64))
    cost_RR[topology.room_R[:, None] != topology.room_R[None, :]] = FORBIDDEN
    members = [np.flatnonzero(topology.node_R == node) for node in range(topology.num_nodes)]
    shapes = [tuple(sorted(topology.room_R[ranks])) for ranks in members]
    cost_NN = np.full((len(members), len(members)), FORBIDDEN)
    place_of: dict[tuple[int, int], NDArray[np.int64]] = {}
    for new, new_ranks in enumerate(members):
        for old, old_ranks in enumerate(members):
            if shapes[new] == shapes[old]:
                block = np.ascontiguousarray(cost_RR[np.ix_(new_ranks, old_ranks)])
                place_of[new, old] = old_ranks[column_of := assign(block)]
                cost_NN[new, old] = block[np.arange(len(block)), column_of].sum()
    renamed_RC = np.empty_like(table_RC)
    for new, old in enumerate(assign(cost_NN)):
        renamed_RC[place_of[new, int(old)]] = table_RC[members[new]]
    return keep_slots(renamed_RC, current_RC, topology)


def keep_slots(table_RC: Ints, current_RC: Ints, topology: Topology) -> Ints:
    """Reorder the slots within each rank: an expert that the rank holds already stays in its slot."""
    stays_RCC = (table_RC[:, :, None] == current_RC[:, None, :]) & (table_RC[:, :, None] >= 0)
    rank, _, slot = np.nonzero(stays_RCC)
    kept_RC = np.full_like(table_RC, -1)
    kept_RC[rank, slot] = current_RC[rank, slot]
    comes_RC = (table_RC >= 0) & ~stays_RCC.any(axis=2)
    for r in np.flatnonzero(comes_RC.any(axis=1)):
        incoming = table_RC[r, comes_RC[r]]
        free = np.flatnonzero(kept_RC[r, : topology.slots_of_rank[r]] < 0)
        kept_RC[r, free[: len(incoming)]] = incoming
    return kept_RC
