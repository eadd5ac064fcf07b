"""From one placement to the next: what is to be loaded, and from where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
FROM_CHECKPOINT = -1
EMPTY = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One slot gets another expert.

    ``source_slot``: a global slot that holds the expert before the migration, ``FROM_CHECKPOINT`` = none does.
    ``expert`` -1 empties the slot, which loads nothing.
    """

    slot: int
    expert: int
    source_slot: int = FROM_CHECKPOINT

    @property
    def loads(self) -> bool:
        return self.expert != EMPTY


def migration_list(current_S: Ints, slots_S: Ints, topology: Topology) -> tuple[Move, ...]:
    """The slots that differ, in order. A source on the same rank comes first, then one in the same node; among equals
    the sources take turns, so that no replica has to send everything."""
    changed = np.flatnonzero(current_S != slots_S)
    rank_S = np.repeat(np.arange(topology.num_ranks), topology.width)
    node_S = topology.node_R[rank_S]
    expert_M = slots_S[changed]
    closeness_MS = (rank_S[changed, None] == rank_S).astype(np.int64) + (node_S[changed, None] == node_S) + 1
    closeness_MS[(expert_M[:, None] != current_S) | (expert_M[:, None] < 0)] = 0
    turn_MS = (np.arange(len(current_S)) - changed[:, None]) % len(current_S)
    source_M = (closeness_MS * (2 * len(current_S)) - turn_MS).argmax(axis=1)
    has_source_M = closeness_MS.max(axis=1, initial=0) > 0
    source_M = np.where(has_source_M, source_M, FROM_CHECKPOINT)
    return tuple(
        Move(slot=int(slot), expert=int(expert), source_slot=int(source))
        for slot, expert, source in zip(changed, expert_M, source_M, strict=True)
    )


def apply_moves(current_S: Ints, moves: Iterable[Move]) -> Ints:
    """The placement after all moves, which take effect at once: sources are read before anything changes."""
    slots_S = current_S.copy()
    for move in moves:
        slots_S[move.slot] = move.expert
    return slots_S
