"""Static placement of one layer: as even as the servers' room allows, moving as little as possible. It is also what the
placement of a view starts from, with replicas by load where loads are known.

Dimensions: R expert ranks, S slots a rank in the global numbering, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertmesh.balancer.replicas import (
    ANY_REPLICAS,
    Counts,
    Floats,
    Held,
    ReplicaRule,
    Table,
    add_replica,
    hold,
    to_slots,
)


class CapacityError(ValueError):
    """The servers together cannot hold every expert."""


def usable_slots(num_experts: int, capacities: Sequence[int]) -> int:
    """Slots that can hold an expert when no rank holds two replicas of one: beyond E a rank's room is of no use."""
    return sum(min(capacity, num_experts) for capacity in capacities)


def place_layer(
    num_experts: int,
    num_slots: int,
    capacities: Sequence[int],
    current_RS: Table | None = None,
    load_E: Floats | None = None,
    rule: ReplicaRule = ANY_REPLICAS,
) -> Table:
    """Slot → expert for every expert rank.

    Every expert gets a slot; ranks hold equally many experts as far as their room allows; no rank holds an expert
    twice. What ``current_RS`` has stays in its slot unless that would break one of these. The same arguments give the
    same table.

    Without loads replica counts differ by at most one. With them the replicas that are there stay, the least useful
    ones go where slots are short, and the rest of the slots goes to the experts whose replicas carry most.

    Either way no expert has fewer replicas than ``rule`` asks for, as far as the slots go.

    Args:
        num_slots: slots to fill over all ranks; cut to what the ranks can hold.
        capacities: room of each of the R ranks.
        current_RS: what the ranks hold now, -1 = empty; any width.
        load_E: load of each expert in any unit, none negative; without ``current_RS`` it counts for nothing.

    Returns:
        int32 [R, max(capacities)], -1 = empty.

    Raises:
        CapacityError: fewer usable slots than experts.
    """
    assert num_slots >= num_experts
    usable = usable_slots(num_experts, capacities)
    if usable < num_experts:
        raise CapacityError(f"{usable} usable slots a layer for {num_experts} experts")
    current_RE = hold(current_RS, len(capacities), num_experts)
    num_slots = min(num_slots, usable)
    quota_R = _even_quotas(num_slots, np.minimum(capacities, num_experts), current_RE.sum(axis=1))
    if not current_RE.any():
        wanted_RE = _linear(num_experts, quota_R)
    elif load_E is not None and load_E.any():
        floor_E = rule.floors(current_RE.sum(axis=0), load_E, num_slots, len(capacities))
        replicas_E = _held_replicas(num_slots, current_RE.sum(axis=0), load_E, floor_E)
        wanted_RE = _thin_out(current_RE, quota_R, replicas_E, load_E / replicas_E)
        _fill_by_load(wanted_RE, quota_R, load_E, floor_E)
    else:
        replicas_E = _even_replicas(num_slots, current_RE.sum(axis=0))
        wanted_RE = _thin_out(current_RE, quota_R, replicas_E, np.zeros(num_experts))
        _complete(wanted_RE, quota_R, replicas_E)
    return to_slots(wanted_RE, capacities, current_RS, max(capacities))


def _even_quotas(num_slots: int, room_R: Counts, held_R: Counts) -> Counts:
    """Experts a rank: equal up to each rank's room; the odd ones go where most is held already."""
    low, high = 0, int(room_R.max())
    while low < high:  # the highest level that all ranks can fill up to
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(room_R, middle).sum() <= num_slots else (low, middle - 1)
    quota_R = np.minimum(room_R, low).astype(np.int64)
    by_held = np.argsort(-held_R, kind="stable")
    has_room = by_held[room_R[by_held] > low]
    quota_R[has_room[: num_slots - int(quota_R.sum())]] += 1
    return quota_R


def _even_replicas(num_slots: int, held_E: Counts) -> Counts:
    """Replicas of each expert: equal; the odd ones go to the experts that have most replicas already."""
    base, odd = divmod(num_slots, len(held_E))
    replicas_E = np.full(len(held_E), base, dtype=np.int64)
    replicas_E[np.argsort(-held_E, kind="stable")[:odd]] += 1
    return replicas_E


def _held_replicas(num_slots: int, held_E: Counts, load_E: Floats, floor_E: Counts) -> Counts:
    """Replicas of each expert: those that are there, ``floor_E`` at least; while those are too many for the slots, the
    ones go that leave the smallest load a replica."""
    replicas_E = np.maximum(held_E, floor_E)
    while replicas_E.sum() > num_slots:
        replicas_E[np.where(replicas_E > floor_E, load_E / np.maximum(replicas_E - 1, 1), np.inf).argmin()] -= 1
    return replicas_E


def _fill_by_load(held_RE: Held, quota_R: Counts, load_E: Floats, floor_E: Counts) -> None:
    """Fill the quotas up in place, among others with the experts that have less than their floor; no expert makes way
    for another one that would go below its own."""
    room_R = quota_R - held_RE.sum(axis=1)
    added, share_E = _additions(held_RE, int(room_R.sum()), load_E, floor_E)
    for expert in added:
        _add_to_lightest(held_RE, room_R, int(expert), share_E)
    held_E = held_RE.sum(axis=0)
    for expert in np.repeat(np.arange(len(floor_E)), np.maximum(floor_E - held_E, 0)):
        add_replica(held_RE, quota_R - held_RE.sum(axis=1), int(expert), held_RE.sum(axis=0) - floor_E)
    room_R = quota_R - held_RE.sum(axis=1)
    while room_R.any():  # the ranks with room had some of these already
        share_E = load_E / held_RE.sum(axis=0)
        lacking_E = (~held_RE & (room_R > 0)[:, None]).any(axis=0)
        _add_to_lightest(held_RE, room_R, int(np.where(lacking_E, share_E, -1.0).argmax()), share_E)


def _additions(held_RE: Held, room: int, load_E: Floats, floor_E: Counts) -> tuple[Counts, Floats]:
    """``room`` experts to add, the heaviest replicas first: up to ``floor_E``, and where a replica carries most; and
    the load of a replica [E] that results."""
    held_E = held_RE.sum(axis=0)
    replicas_E = np.maximum(held_E, floor_E)
    for _ in range(room - int((replicas_E - held_E).sum())):
        replicas_E[np.where(replicas_E < len(held_RE), load_E / replicas_E, -1.0).argmax()] += 1
    share_E = load_E / replicas_E
    added = np.repeat(np.arange(len(load_E)), replicas_E - held_E)
    return added[np.argsort(-share_E[added], kind="stable")], share_E


def _add_to_lightest(held_RE: Held, room_R: Counts, expert: int, share_E: Floats) -> None:
    """Where there is room for it; nowhere if every rank with room holds it."""
    takes_R = (room_R > 0) & ~held_RE[:, expert]
    if takes_R.any():
        rank = np.where(takes_R, held_RE @ share_E, np.inf).argmin()
        held_RE[rank, expert] = True
        room_R[rank] -= 1


def _linear(num_experts: int, quota_R: Counts) -> Held:
    """Experts 0, 1, 2, ... in order over the ranks, again from 0 for replicas: no rank sees an expert twice, since
    none takes more than E in a row."""
    held_RE = np.zeros((len(quota_R), num_experts), dtype=np.bool_)
    ends_R = np.cumsum(quota_R)
    for rank, end in enumerate(ends_R):
        held_RE[rank, np.arange(end - quota_R[rank], end) % num_experts] = True
    return held_RE


def _thin_out(current_RE: Held, quota_R: Counts, replicas_E: Counts, share_E: Floats) -> Held:
    """The part of ``current_RE`` that fits the quotas: surplus goes first where both rank and expert have too much.

    Of equal experts a rank gives the lightest away, so that the heavy ones can get replicas elsewhere.
    """
    kept_RE = current_RE.copy()
    for rank in np.argsort(-(current_RE.sum(axis=1) - quota_R), kind="stable"):
        surplus_E = np.maximum(kept_RE.sum(axis=0) - replicas_E, 0)
        held = np.flatnonzero(kept_RE[rank])
        over = len(held) - int(quota_R[rank])
        if over > 0:
            # Highest surplus first, then the lightest, then the highest expert id.
            kept_RE[rank, held[np.lexsort((-held, share_E[held], -surplus_E[held]))[:over]]] = False
    for expert in np.flatnonzero(kept_RE.sum(axis=0) > replicas_E):
        holders = np.flatnonzero(kept_RE[:, expert])
        fullest = holders[np.argsort(-kept_RE[holders].sum(axis=1), kind="stable")]
        kept_RE[fullest[: len(holders) - int(replicas_E[expert])], expert] = False
    return kept_RE


def _complete(held_RE: Held, quota_R: Counts, replicas_E: Counts) -> None:
    """Add experts in place until every rank has its quota and every expert its replicas.

    An augmenting path exists as long as something is missing: near-equal replica counts are majorised by every other
    split, so quotas ≤ E can always be met (Gale–Ryser).
    """
    while True:
        missing = np.flatnonzero(held_RE.sum(axis=0) < replicas_E)
        if len(missing) == 0:
            return
        add_replica(held_RE, quota_R - held_RE.sum(axis=1), int(missing[0]))
