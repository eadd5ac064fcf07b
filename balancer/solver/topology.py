"""Where slots are: on which rank, in which node."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The R expert ranks of a view in order.

    Global slot ``r * width + c`` is slot c of rank r, for every c below ``width``; slots beyond a rank's own are
    always empty (-1).

    Args:
        slots_of_rank: slots of one layer on each rank.
        node_of_rank: any numbering of nodes.
    """

    slots_of_rank: tuple[int, ...]
    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.slots_of_rank or min(self.slots_of_rank) < 0 or max(self.slots_of_rank) == 0:
            raise ValueError(f"slots_of_rank {self.slots_of_rank}: there must be slots, and none negative")
        if len(self.slots_of_rank) != len(self.node_of_rank):
            raise ValueError(f"{len(self.slots_of_rank)} ranks have slots, {len(self.node_of_rank)} have a node")

    @classmethod
    def even(cls, *, num_slots: int, num_ranks: int, num_nodes: int = 1) -> Topology:
        """Equal ranks and nodes; where slots or ranks do not divide, the first ranks have a slot more and the first
        nodes a rank more."""
        base, odd = divmod(num_slots, num_ranks)
        return cls(
            slots_of_rank=tuple(base + (rank < odd) for rank in range(num_ranks)),
            node_of_rank=tuple(rank * num_nodes // num_ranks for rank in range(num_ranks)),
        )

    @property
    def num_ranks(self) -> int:
        return len(self.slots_of_rank)

    @cached_property
    def width(self) -> int:
        return max(self.slots_of_rank)

    @cached_property
    def num_slots(self) -> int:
        return sum(self.slots_of_rank)

    @cached_property
    def num_nodes(self) -> int:
        return len(set(self.node_of_rank))

    @cached_property
    def node_R(self) -> NDArray[np.int32]:
        """Nodes numbered from 0 in the order of their ids, int32 [R]."""
        return np.unique(np.asarray(self.node_of_rank), return_inverse=True)[1].astype(np.int32)

    @cached_property
    def room_R(self) -> NDArray[np.int32]:
        return np.asarray(self.slots_of_rank, np.int32)

    def usable_slots(self, num_experts: int) -> int:
        """Slots that can hold an expert when no rank holds two replicas of one."""
        return sum(min(slots, num_experts) for slots in self.slots_of_rank)
