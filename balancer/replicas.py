"""How many replicas each expert has at least, and how a layer gets them. Pure.

Dimensions: R expert ranks, S slots a rank in the global numbering, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.mesh.config import ExpertConfig

Table = NDArray[np.int32]
Held = NDArray[np.bool_]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

STAYS_HOT = 1.25
"""An expert with a second replica counts as so much hotter: two that are about as hot do not take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRule:
    """
    Args:
        min_replicas: of every expert.
        num_hot: so many experts, those with most load, have two replicas at least.
    """

    min_replicas: int = 1
    num_hot: int = 0

    @classmethod
    def of(cls, config: ExpertConfig) -> ReplicaRule:
        return cls(min_replicas=config.min_replicas, num_hot=config.num_hot_experts)

    @property
    def asks_for_any(self) -> bool:
        """Whether it asks for more than one replica of anything."""
        return self.min_replicas > 1 or self.num_hot > 0

    def floors(self, held_E: Counts, load_E: Floats | None, num_slots: int, num_ranks: int) -> Counts:
        """Replicas that each expert has at least, int64 [E]: what the rule asks for as far as the slots go, second
        replicas before third ones, and hot experts first. They differ by one at most, so that every split of
        ``num_slots`` over ranks can meet them.

        Args:
            held_E: replicas that are there; of equally hot experts those that have most keep them.
            load_E: without it no expert is hot.
            num_slots: slots that can be filled, at least one an expert.
        """
        num_experts = len(held_E)
        floor_E = np.ones(num_experts, np.int64)
        heat_E = np.zeros(num_experts) if load_E is None else load_E * np.where(held_E > 1, STAYS_HOT, 1.0)
        hottest = np.lexsort((-held_E, -heat_E))
        num_hot = 0 if load_E is None else min(self.num_hot, num_experts)
        for count in range(2, min(max(self.min_replicas, 2), num_ranks) + 1):
            wanted = num_experts if count <= self.min_replicas else num_hot
            floor_E[hottest[: min(wanted, num_slots - int(floor_E.sum()))]] = count
        return floor_E


ANY_REPLICAS = ReplicaRule()


def hold(table_RS: Table | None, num_ranks: int, num_experts: int) -> Held:
    """bool [R, E]: which rank holds which expert; nothing without a table."""
    held_RE = np.zeros((num_ranks, num_experts), dtype=np.bool_)
    if table_RS is not None:
        rank, slot = np.nonzero(table_RS >= 0)
        held_RE[rank, table_RS[rank, slot]] = True
    return held_RE


def restore(table_RS: Table, room_R: Sequence[int], floor_E: Counts, max_loads: int | None = None) -> Table:
    """``table_RS`` with more replicas of the experts that have fewer than ``floor_E``: in empty slots, else in place of
    the replicas that are most above theirs; what stays keeps its slot.

    Args:
        table_RS: no rank holds an expert twice; every expert is there.
        room_R: slots that each rank can fill.
        floor_E: see ``ReplicaRule.floors``, for as many slots as the ranks have or fewer.
        max_loads: stop before more slots than these are loaded, unless one replica takes more than that.

    Returns:
        int32 [R, S].
    """
    held_RE = hold(table_RS, len(table_RS), len(floor_E))
    was_RE = held_RE.copy()
    usable_R = np.minimum(room_R, len(floor_E))
    for expert in np.repeat(np.arange(len(floor_E)), np.maximum(floor_E - held_RE.sum(axis=0), 0)):
        grown_RE = held_RE.copy()
        add_replica(grown_RE, usable_R - held_RE.sum(axis=1), int(expert), held_RE.sum(axis=0) - floor_E)
        loads = int((grown_RE & ~was_RE).sum())
        if max_loads is not None and loads > max_loads and (held_RE != was_RE).any():
            break
        held_RE = grown_RE
    return to_slots(held_RE, room_R, table_RS, table_RS.shape[1])


def add_replica(held_RE: Held, free_R: Counts, expert: int, spare_E: Counts | None = None) -> None:
    """One more rank for ``expert``, in place: the one with most room, else along a shortest augmenting path of the
    bipartite graph ranks × experts, on which ranks hand other experts on until one lands where there is room.

    Args:
        free_R: empty slots of each rank.
        spare_E: replicas beyond what each expert needs: where no rank has room, the path ends where one of them makes
            way. None: none does.
    """
    lacks_R = ~held_RE[:, expert]
    if (lacks_R & (free_R > 0)).any():
        held_RE[np.where(lacks_R, free_R, 0).argmax(), expert] = True
        return
    came_from: dict[int, tuple[int, int]] = {}  # rank → (expert that it takes, rank that hands it over; -1 = new)
    frontier = [(int(rank), expert, -1) for rank in np.flatnonzero(lacks_R)]
    while frontier:
        following = []
        for rank, taken, giver in frontier:
            if rank in came_from:
                continue
            came_from[rank] = (taken, giver)
            spare = -1 if spare_E is None else int(np.where(held_RE[rank], spare_E, 0).argmax())
            if free_R[rank] > 0 or (spare_E is not None and held_RE[rank, spare] and spare_E[spare] > 0):
                if free_R[rank] <= 0:
                    held_RE[rank, spare] = False
                _hand_on(held_RE, came_from, rank)
                return
            handable_RE = held_RE[rank] & ~held_RE
            following += [(int(to), int(np.argmax(handable_RE[to])), rank) for to in np.flatnonzero(handable_RE.any(1))]
        frontier = following
    raise AssertionError("quotas and replica counts cannot be met together")


def _hand_on(held_RE: Held, came_from: dict[int, tuple[int, int]], rank: int) -> None:
    """Along the path that ends at ``rank`` each one takes what the one before it gives away."""
    while rank != -1:
        taken, giver = came_from[rank]
        held_RE[rank, taken] = True
        if giver != -1:
            held_RE[giver, taken] = False
        rank = giver


def to_slots(wanted_RE: Held, capacities: Sequence[int], current_RS: Table | None, width: int) -> Table:
    """Local slots, int32 [R, width]: what stays keeps its slot, what comes takes the lowest free ones, in the order of
    expert ids."""
    table_RS = np.full((len(capacities), width), -1, dtype=np.int32)
    for rank, capacity in enumerate(capacities):
        missing_E = wanted_RE[rank].copy()
        if current_RS is not None:
            for slot, expert in enumerate(current_RS[rank, :capacity]):
                if expert >= 0 and missing_E[expert]:
                    table_RS[rank, slot] = expert
                    missing_E[expert] = False
        incoming = np.flatnonzero(missing_E)
        table_RS[rank, np.flatnonzero(table_RS[rank, :capacity] < 0)[: len(incoming)]] = incoming
    return table_RS
