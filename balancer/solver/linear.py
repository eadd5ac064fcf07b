"""The placement without any statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.topology import Topology


def linear(num_experts: int, topology: Topology) -> NDArray[np.int32]:
    """Experts 0, 1, 2, ... in order over the ranks, from 0 again for replicas; int32 [ranks x width], -1 = empty.

    No rank gets an expert twice: none takes more than all of them in a row.
    """
    table_RC = np.full((topology.num_ranks, topology.width), -1, np.int32)
    following = 0
    for rank, room in enumerate(topology.slots_of_rank):
        taken = min(room, num_experts)
        table_RC[rank, :taken] = np.arange(following, following + taken) % num_experts
        following += taken
    return table_RC.reshape(-1)
