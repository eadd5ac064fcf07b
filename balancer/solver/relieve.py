"""Load relief within a budget: the changes of a placement that lower its fullest ranks most for each slot loaded.

Dimensions: E experts, R ranks, C slots of the widest rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
LEAST_GAIN = 1e-12


class Layer(NamedTuple):
    """A placement and its loads; the arrays change in place, but for ``room_R``, ``load_E`` and ``was_RE``."""

    table_RC: Ints
    room_R: Ints
    """slots of each rank; those beyond stay empty"""
    load_E: Floats
    was_RE: Bools
    """what the ranks held at the start: putting one of these back loads nothing"""
    replicas_E: Ints
    homes_ER: Ints
    """the ranks of each expert, in the first ``replicas_E`` entries"""
    holds_RE: Bools
    share_E: Floats
    """load of one replica: an expert's load is split equally"""
    one_more_E: Floats
    """what the share becomes with one more replica"""
    over_R: Floats
    """load above the mean, of a rank; negative below it"""
    floor_E: Ints
    """replicas below which no expert may go"""


class Change(NamedTuple):
    """Slot (r, c) gets expert ``comes``. What it held, if anything, goes to slot (q, d), where ``comes`` is from, or
    is one replica less (q = -1)."""

    gain: float
    """how much the sum of squares of the load above the mean sinks, for each slot that is loaded"""
    r: int
    c: int
    q: int
    d: int
    comes: int
    loads: int


@compiled
def relieve(
    table_RC: Ints,
    room_R: Ints,
    load_E: Floats,
    was_RE: Bools,
    floor_E: Ints,
    cap: float,
    budget: int,
    move_cost: float,
) -> int:
    """Bring the ranks above ``cap`` down, in place, changing at most ``budget`` slots, best change first.

    A change swaps two slots, puts another expert into the slot of a replica, or a replica into an empty slot.
    No expert goes below ``floor_E`` replicas. ``move_cost`` ends the search when no slot takes off that much of the
    mean load. Returns the slots changed.
    """
    layer = layer_of(table_RC, room_R, load_E, was_RE, floor_E)
    moved = 0
    cap -= load_E.sum() / len(room_R)
    while layer.over_R.max() > cap:
        best = best_change(layer, budget - moved, move_cost)
        if best.r == -1:
            break
        _carry_out(layer, best)
        moved += best.loads
    return moved


@compiled
def layer_of(table_RC: Ints, room_R: Ints, load_E: Floats, was_RE: Bools, floor_E: Ints) -> Layer:
    """``table_RC`` with its sums; changes of the layer change it."""
    num_ranks, width = table_RC.shape
    num_experts = len(load_E)
    replicas_E = np.zeros(num_experts, np.int32)
    homes_ER = np.full((num_experts, num_ranks), -1, np.int32)
    holds_RE = np.zeros((num_ranks, num_experts), np.bool_)
    for r in range(num_ranks):
        for c in range(width):
            e = table_RC[r, c]
            if e >= 0:
                homes_ER[e, replicas_E[e]] = r
                replicas_E[e] += 1
                holds_RE[r, e] = True
    share_E, one_more_E = np.empty(num_experts), np.empty(num_experts)
    over_R = np.empty(num_ranks)
    layer = Layer(
        table_RC, room_R, load_E, was_RE, replicas_E, homes_ER, holds_RE, share_E, one_more_E, over_R, floor_E
    )
    _sum_loads(layer)
    return layer


@compiled
def _sum_loads(layer: Layer) -> None:
    """Afresh each time, so that rounding errors do not add up."""
    for e in range(len(layer.load_E)):
        layer.share_E[e] = layer.load_E[e] / layer.replicas_E[e]
        layer.one_more_E[e] = layer.load_E[e] / (layer.replicas_E[e] + 1)
    layer.over_R[:] = -layer.load_E.sum() / len(layer.over_R)
    for r in range(layer.table_RC.shape[0]):
        for c in range(layer.table_RC.shape[1]):
            e = layer.table_RC[r, c]
            if e >= 0:
                layer.over_R[r] += layer.share_E[e]


@compiled
def best_change(layer: Layer, budget: int, move_cost: float) -> Change:
    """What relieves the fullest rank and all others most for each slot loaded; r = -1: nothing does."""
    top = int(np.argmax(layer.over_R))
    best = _best_swap(layer, top, budget, move_cost)
    best = _best_replacement(layer, top, budget, move_cost, best)
    return _best_filling(layer, top, budget, move_cost, best)


@compiled
def _best_swap(layer: Layer, top: int, budget: int, move_cost: float) -> Change:
    """Of the slots of rank ``top`` with those of others."""
    table_RC, holds_RE, was_RE = layer.table_RC, layer.holds_RE, layer.was_RE  # not looked up in the loops
    share_E, over_R = layer.share_E, layer.over_R
    best = Change(LEAST_GAIN, -1, -1, -1, -1, -1, 0)
    for c in range(table_RC.shape[1]):
        e = table_RC[top, c]
        # No swap relieves the rest, and none loads less than half a slot.
        if e < 0 or 2 * _relief(over_R[top], -share_E[e]) <= best.gain:
            continue
        for q in range(table_RC.shape[0]):
            if q == top or holds_RE[q, e]:
                continue
            for d in range(table_RC.shape[1]):
                f = table_RC[q, d]
                if f < 0 or share_E[f] >= share_E[e] or holds_RE[top, f]:
                    continue
                less = share_E[e] - share_E[f]
                gain = _relief(over_R[top], -less) + _relief(over_R[q], less)
                if 2 * gain <= best.gain:
                    continue
                loads = int(not was_RE[top, f]) + int(not was_RE[q, e])
                loads -= int(not was_RE[top, e]) + int(not was_RE[q, f])
                gain /= max(loads, 0.5)
                if loads <= budget and gain > best.gain and less > move_cost * max(loads, 0):
                    best = Change(gain, top, c, q, d, int(np.int64(f)), loads)
    return best


@compiled
def _best_replacement(layer: Layer, top: int, budget: int, move_cost: float, best: Change) -> Change:
    """``best`` or a better one: one more replica for an expert of rank ``top``, or one less there."""
    num_ranks, width = layer.table_RC.shape
    share_E, one_more_E, over_R = layer.share_E, layer.one_more_E, layer.over_R
    relieved_E = _relieved_by_one_more(layer)
    for r in range(num_ranks):
        for c in range(width):
            e = layer.table_RC[r, c]
            if e < 0 or layer.replicas_E[e] <= layer.floor_E[e]:
                continue
            for candidate in range(len(layer.load_E) if r == top else width):
                f = candidate if r == top else layer.table_RC[top, candidate]
                if f < 0 or layer.holds_RE[r, f]:
                    continue
                # The other replicas of e only get more, and no change loads less than half a slot.
                if 2 * (relieved_E[f] + _relief(over_R[r], one_more_E[f] - share_E[e])) <= best.gain:
                    continue
                loads = int(not layer.was_RE[r, f]) - int(not layer.was_RE[r, e])
                if loads > budget:
                    continue
                gain, less = _replacement(layer, top, r, e, f)
                gain /= max(loads, 0.5)
                if gain > best.gain and less > move_cost * max(loads, 0):
                    best = Change(gain, r, c, -1, -1, int(np.int64(f)), loads)
    return best


@compiled
def _relieved_by_one_more(layer: Layer) -> Floats:
    """What the ranks of each expert [E] are relieved of when it has one more replica elsewhere."""
    relieved_E = np.zeros(len(layer.load_E))
    for e in range(len(layer.load_E)):
        for k in range(layer.replicas_E[e]):
            over = layer.over_R[layer.homes_ER[e, k]]
            relieved_E[e] += _relief(over, layer.one_more_E[e] - layer.share_E[e])
    return relieved_E


@compiled
def _best_filling(layer: Layer, top: int, budget: int, move_cost: float, best: Change) -> Change:
    """``best`` or a better one: an empty slot of another rank takes a replica of an expert of rank ``top``."""
    if (layer.table_RC >= 0).sum() == layer.room_R.sum():
        return best
    relieved_E = _relieved_by_one_more(layer)
    for r in range(layer.table_RC.shape[0]):
        c = 0
        while c < layer.room_R[r] and layer.table_RC[r, c] >= 0:
            c += 1
        if r == top or c >= layer.room_R[r]:
            continue
        for f in layer.table_RC[top]:
            if f < 0 or layer.holds_RE[r, f]:
                continue
            loads = int(not layer.was_RE[r, f])
            less = layer.share_E[f] - layer.one_more_E[f]
            gain = (relieved_E[f] + _relief(layer.over_R[r], layer.one_more_E[f])) / max(loads, 0.5)
            if loads <= budget and gain > best.gain and less > move_cost * loads:
                best = Change(gain, r, c, -1, -1, int(np.int64(f)), loads)
    return best


@compiled
def _replacement(layer: Layer, top: int, r: int, e: int, f: int) -> tuple[float, float]:
    """What it relieves when rank r has a replica of f instead of one of e, and what rank ``top`` sheds."""
    share_E, one_more_E, over_R, homes_ER = layer.share_E, layer.one_more_E, layer.over_R, layer.homes_ER
    more_e = layer.load_E[e] / (layer.replicas_E[e] - 1) - share_E[e]
    more_f = one_more_E[f] - share_E[f]
    gain = less = 0.0
    for k in range(layer.replicas_E[e]):
        q = homes_ER[e, k]
        more = one_more_E[f] - share_E[e] if q == r else more_e + (more_f if layer.holds_RE[q, f] else 0.0)
        gain += _relief(over_R[q], more)
        less -= more if q == top else 0.0
    for k in range(layer.replicas_E[f]):
        q = homes_ER[f, k]
        if not layer.holds_RE[q, e]:
            gain += _relief(over_R[q], more_f)
            less -= more_f if q == top else 0.0
    return gain, less


@compiled
def _relief(over: float, more: float) -> float:
    """How much the square of a rank's load above the mean sinks when ``more`` is added to ``over``, what it is above
    the mean now."""
    before, after = max(over, 0.0), max(over + more, 0.0)
    return before * before - after * after


@compiled
def _carry_out(layer: Layer, change: Change) -> None:
    goes = layer.table_RC[change.r, change.c]
    if goes >= 0:
        _leave(layer, change.r, goes)
    if change.q >= 0:
        _leave(layer, change.q, change.comes)
        _enter(layer, change.q, change.d, goes)
    _enter(layer, change.r, change.c, change.comes)
    _sum_loads(layer)


@compiled
def _leave(layer: Layer, r: int, e: int) -> None:
    layer.holds_RE[r, e] = False
    last = layer.replicas_E[e] - 1
    for k in range(last):
        if layer.homes_ER[e, k] == r:
            layer.homes_ER[e, k] = layer.homes_ER[e, last]
            break
    layer.replicas_E[e] = last


@compiled
def _enter(layer: Layer, r: int, c: int, e: int) -> None:
    layer.table_RC[r, c] = e
    layer.holds_RE[r, e] = True
    layer.homes_ER[e, layer.replicas_E[e]] = r
    layer.replicas_E[e] += 1
