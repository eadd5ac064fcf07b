"""What the joint search keeps up to date beside a placement, and the changes it can make and undo.

Dimensions: E experts, R ranks, C slots of the widest rank, N nodes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class SearchState(NamedTuple):
    """A placement and its sums; the arrays change in place."""

    table_RC: Ints
    """slot → expert, -1 = empty"""
    room_R: Ints
    """slots of each rank; those beyond stay empty"""
    node_R: Ints
    load_E: Floats
    pair_EE: Floats
    """share of the tokens that choose both experts; symmetric, diagonal 0"""
    likeness_EE: Floats
    """``pair_EE`` over the geometric mean of the two experts' own shares"""
    replicas_E: Ints
    credit_E: Floats
    """what a pair of this expert counts wherever it meets: 1 / sqrt(replicas). A token with both experts can use one
    meeting only, and with several partners of a replicated expert it often cannot follow all of them."""
    homes_ER: Ints
    """the ranks of each expert, in the first ``replicas_E`` entries"""
    holds_RE: Bools
    count_NE: Ints
    """replicas in each node"""
    near_RE: Floats
    """sum over the experts f on a rank of ``credit_E[f] * pair_EE[f, e]``"""
    near_NE: Floats
    """the same over the experts in a node, each once"""
    triples_RC: Floats
    """what the expert in a slot adds to the triples of its rank"""
    load_R: Floats
    """with each expert's load split equally over its replicas"""
    fixed_R: Floats
    """the part of ``load_R`` that no other rank can take: experts with one replica"""
    was_RE: Bools
    """what the ranks held before: only other experts have to be loaded"""
    floor_E: Ints
    """replicas below which no expert may go"""


@compiled
def build_state(
    table_RC: Ints,
    room_R: Ints,
    node_R: Ints,
    num_nodes: int,
    load_E: Floats,
    pair_EE: Floats,
    likeness_EE: Floats,
    was_RE: Bools,
    floor_E: Ints,
) -> SearchState:
    """The state of ``table_RC``, which the search then changes in place."""
    num_ranks, width = table_RC.shape
    num_experts = len(load_E)
    s = SearchState(
        table_RC,
        room_R,
        node_R,
        load_E,
        pair_EE,
        likeness_EE,
        np.zeros(num_experts, np.int32),
        np.ones(num_experts),
        np.full((num_experts, num_ranks), -1, np.int32),
        np.zeros((num_ranks, num_experts), np.bool_),
        np.zeros((num_nodes, num_experts), np.int32),
        np.zeros((num_ranks, num_experts)),
        np.zeros((num_nodes, num_experts)),
        np.zeros((num_ranks, width)),
        np.zeros(num_ranks),
        np.zeros(num_ranks),
        was_RE,
        floor_E,
    )
    for r in range(num_ranks):
        for c in range(width):
            if table_RC[r, c] >= 0:
                put_in(s, r, c, table_RC[r, c])
    for e in range(num_experts):
        add_near(s, e, 1.0)
        add_load(s, e, 1.0)
    for r in range(num_ranks):
        refresh_triples(s, r)
    return s


@compiled
def take_out(s: SearchState, r: int, c: int) -> None:
    """Empty a slot; loads and ``near`` do not follow."""
    e = s.table_RC[r, c]
    s.table_RC[r, c] = -1
    s.holds_RE[r, e] = False
    s.count_NE[s.node_R[r], e] -= 1
    last = s.replicas_E[e] - 1
    for k in range(last):
        if s.homes_ER[e, k] == r:
            s.homes_ER[e, k] = s.homes_ER[e, last]
            break
    s.replicas_E[e] = last
    s.credit_E[e] = 1.0 / np.sqrt(max(last, 1))


@compiled
def put_in(s: SearchState, r: int, c: int, e: int) -> None:
    """Fill an empty slot; loads and ``near`` do not follow."""
    s.table_RC[r, c] = e
    s.holds_RE[r, e] = True
    s.count_NE[s.node_R[r], e] += 1
    s.homes_ER[e, s.replicas_E[e]] = r
    s.replicas_E[e] += 1
    s.credit_E[e] = 1.0 / np.sqrt(s.replicas_E[e])


@compiled
def swap(s: SearchState, r: int, c: int, q: int, d: int) -> None:
    """Exchange two slots; loads and ``near`` do not follow."""
    e, f = s.table_RC[r, c], s.table_RC[q, d]
    take_out(s, r, c)
    take_out(s, q, d)
    put_in(s, r, c, f)
    put_in(s, q, d, e)


@compiled
def replace(s: SearchState, r: int, c: int, f: int) -> None:
    """Put ``f`` in the slot of another expert; everything follows."""
    e = s.table_RC[r, c]
    _count(s, e, -1.0)
    _count(s, f, -1.0)
    take_out(s, r, c)
    put_in(s, r, c, f)
    _count(s, e, 1.0)
    _count(s, f, 1.0)
    for k in range(s.replicas_E[e]):
        refresh_triples(s, s.homes_ER[e, k])
    for k in range(s.replicas_E[f]):
        refresh_triples(s, s.homes_ER[f, k])


@compiled
def fill(s: SearchState, r: int, c: int, e: int) -> None:
    """Put one more replica into an empty slot; everything follows."""
    _count(s, e, -1.0)
    put_in(s, r, c, e)
    _count(s, e, 1.0)
    for k in range(s.replicas_E[e]):
        refresh_triples(s, s.homes_ER[e, k])


@compiled
def clear(s: SearchState, r: int, c: int) -> None:
    """Empty the slot of a replica; everything follows."""
    e = s.table_RC[r, c]
    _count(s, e, -1.0)
    take_out(s, r, c)
    _count(s, e, 1.0)
    s.triples_RC[r, c] = 0.0
    refresh_triples(s, r)
    for k in range(s.replicas_E[e]):
        refresh_triples(s, s.homes_ER[e, k])


@compiled
def _count(s: SearchState, e: int, sign: float) -> None:
    add_load(s, e, sign)
    add_near(s, e, sign)


@compiled
def add_near(s: SearchState, e: int, sign: float) -> None:
    """Add what ``e`` is to the others, or take it away; call it with the same homes both times."""
    credit_E = sign * s.credit_E[e] * s.pair_EE[e]
    for k in range(s.replicas_E[e]):
        s.near_RE[s.homes_ER[e, k]] += credit_E
    for n in range(s.count_NE.shape[0]):
        if s.count_NE[n, e] > 0:
            s.near_NE[n] += credit_E


@compiled
def add_load(s: SearchState, e: int, sign: float) -> None:
    for k in range(s.replicas_E[e]):
        s.load_R[s.homes_ER[e, k]] += sign * s.load_E[e] / s.replicas_E[e]
    if s.replicas_E[e] == 1:
        s.fixed_R[s.homes_ER[e, 0]] += sign * s.load_E[e]


@compiled
def follow_swap(s: SearchState, r: int, q: int, e: int, f: int) -> None:
    """Bring ``near`` and the triples up to date: e went from rank r to q, f from q to r."""
    _exchange(s.near_RE[r], s.near_RE[q], s.credit_E[f], s.pair_EE[f], s.credit_E[e], s.pair_EE[e])
    refresh_triples(s, r)
    refresh_triples(s, q)
    n, m = s.node_R[r], s.node_R[q]
    if n != m:
        _follow_node(s, n, e, f)
        _follow_node(s, m, f, e)


@compiled
def _exchange(
    one_E: Floats, other_E: Floats, came_credit: float, came_E: Floats, went_credit: float, went_E: Floats
) -> None:
    for g in range(len(one_E)):
        change = came_credit * came_E[g] - went_credit * went_E[g]
        one_E[g] += change
        other_E[g] -= change


@compiled
def _follow_node(s: SearchState, n: int, went: int, came: int) -> None:
    if s.count_NE[n, came] == 1:
        s.near_NE[n] += s.credit_E[came] * s.pair_EE[came]
    if s.count_NE[n, went] == 0:
        s.near_NE[n] -= s.credit_E[went] * s.pair_EE[went]


@compiled
def triples(s: SearchState, r: int, c: int, e: int) -> float:
    """Sum over pairs of the other slots of rank r of the estimated share of tokens that choose both and ``e``, were
    ``e`` in slot (r, c); with the credit of all three."""
    total = 0.0
    like_E = s.likeness_EE[e]
    for i in range(s.table_RC.shape[1]):
        f = s.table_RC[r, i]
        if i == c or f < 0:
            continue
        like_f_E = s.likeness_EE[f]
        inner = 0.0
        for j in range(i):
            g = s.table_RC[r, j]
            if j != c and g >= 0:
                inner += like_E[g] * like_f_E[g] * s.credit_E[g]
        total += inner * like_E[f] * s.credit_E[f]
    return float(total * s.credit_E[e])


@compiled
def refresh_triples(s: SearchState, r: int) -> None:
    for c in range(s.table_RC.shape[1]):
        if s.table_RC[r, c] >= 0:
            s.triples_RC[r, c] = triples(s, r, c, s.table_RC[r, c])
