"""DeepSeek's EPLB as a ``PlacementPolicy``: every proposal places the layer afresh, by load alone. Imported on the
worker thread only: numba takes a while.

Where ranks have equally many slots it is the published algorithm, hierarchical on several nodes of equal size that the
experts divide over, else global. Unequal ranks get its two steps, greedy replication and packing, with their own room.
Two replicas of an expert that it puts on one rank are parted, since a mesh gains nothing from the second one.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C usable slots of the widest rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Proposal
from expertmesh.balancer.policy_tables import Tables
from expertmesh.balancer.replicas import ANY_REPLICAS, ReplicaRule, restore
from expertmesh.balancer.solver import Topology, eplb_global, eplb_hierarchical, evaluate
from expertmesh.balancer.solver.balance import min_max_replicas, pack
from expertmesh.balancer.solver.relabel import relabel

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


class EplbPolicy:
    """Gains count by balance alone, over the same noise as the solver's.

    The algorithm has no incremental mode: ``max_loads`` is not kept, a proposal loads what the new placement takes.
    Ranks are named such that this is as little as possible.

    Args:
        max_filled: slots of a layer that may hold an expert, over all ranks; more only where more do already. None =
            all that there are.
        rule: replicas that experts have at least, as far as the slots go.
    """

    def __init__(self, *, max_filled: int | None = None, rule: ReplicaRule = ANY_REPLICAS) -> None:
        self._max_filled = max_filled
        self._rule = rule

    def compile(self) -> None:
        """Have what is compiled compiled, or loaded from the cache of an earlier process."""
        counts = LayerStatistics(tokens=9.0, load_E=np.array([3.0, 2, 1]), coactivation_EE=None)
        for current in ((0, 1, 0, 2), (0, 1, 2, -1)):
            layout = Layout(
                width=2, room_R=(2, sum(e >= 0 for e in current[2:])), node_R=("a", "a"), server_R=("a", "b")
            )
            self.propose(counts, layout, current, None)

    def propose(
        self, statistics: LayerStatistics, layout: Layout, current: Sequence[int], max_loads: int | None
    ) -> Proposal:
        """See ``PlacementPolicy``."""
        load_E = statistics.load_E
        tables = Tables.of(layout, current, len(load_E), self._max_filled)
        topology, current_RC = tables.topology, tables.current_RC
        table_RC = eplb_table(load_E, topology)
        if self._rule.asks_for_any:
            floor_E = tables.floors(self._rule, load_E).astype(np.int64)
            table_RC = restore(table_RC, topology.slots_of_rank, floor_E)
        planned_RC = relabel(table_RC, current_RC, topology, len(load_E))
        now = evaluate(current_RC.ravel(), load_E, None, topology)
        planned = evaluate(planned_RC.ravel(), load_E, None, topology, current=current_RC.ravel())
        before, after = (
            evaluate(table.ravel(), load_E, statistics.coactivation_EE, topology) for table in (current_RC, planned_RC)
        )
        return tables.propose(planned_RC, statistics, judged=(now, planned), shown=(before, after))


def eplb_table(load_E: Floats, topology: Topology) -> Ints:
    """EPLB's placement of one layer without two replicas of an expert on a rank, int32 [R, C], -1 = empty.

    Raises:
        ValueError: there are fewer usable slots than experts, or a load is negative or not finite.
    """
    if topology.usable_slots(len(load_E)) < len(load_E):
        raise ValueError(f"{topology.usable_slots(len(load_E))} usable slots a layer for {len(load_E)} experts")
    if not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError("load_E must hold one finite number for each expert, none negative")
    if len(set(topology.slots_of_rank)) > 1:
        replicas_E = min_max_replicas(
            load_E, topology.usable_slots(len(load_E)), topology.num_ranks, np.ones(len(load_E), np.int32)
        )
        return pack(load_E, replicas_E, topology.room_R, topology.width)
    sizes = set(np.bincount(topology.node_R).tolist())
    nodes = topology.num_nodes
    per_node = topology.num_slots // nodes
    if nodes > 1 and len(sizes) == 1 and len(load_E) % nodes == 0 and per_node >= len(load_E) // nodes:
        groups = len(load_E)  # the models served choose experts without regard to groups: each is one
        slots_S = eplb_hierarchical(load_E[None], topology.num_slots, topology.num_ranks, nodes, groups)[0]
        table_RC = np.empty((topology.num_ranks, topology.width), np.int32)
        table_RC[np.argsort(topology.node_R, kind="stable")] = slots_S.reshape(table_RC.shape)
    else:
        slots_S = eplb_global(load_E[None], topology.num_slots, topology.num_ranks)[0]
        table_RC = slots_S.reshape(topology.num_ranks, topology.width).astype(np.int32)
    part_replicas(table_RC, load_E, topology.node_R)
    return table_RC


def part_replicas(table_RC: Ints, load_E: Floats, node_R: Ints) -> None:
    """Swap the second replica of an expert on a rank, in place, with the slot of another rank that is closest to it in
    load, of the same node if there is one; where no swap is possible, the expert that carries most a replica and that
    the rank lacks takes its slot."""
    replicas_E = np.bincount(table_RC.ravel(), minlength=len(load_E))
    for rank, experts_C in enumerate(table_RC):
        for slot in np.flatnonzero([expert in experts_C[:c] for c, expert in enumerate(experts_C)]):
            expert, share_E = experts_C[slot], load_E / replicas_E
            holds_R = (table_RC == expert).any(axis=1)
            swap_RC = ~holds_R[:, None] & ~np.isin(table_RC, experts_C)
            near_RC = swap_RC & (node_R == node_R[rank])[:, None]
            if swap_RC.any():
                cost_RC = np.where(
                    near_RC if near_RC.any() else swap_RC, np.abs(share_E[table_RC] - share_E[expert]), np.inf
                )
                other = np.unravel_index(cost_RC.argmin(), cost_RC.shape)
                table_RC[rank, slot], table_RC[other] = table_RC[other], expert
            else:
                lacked_E = ~np.isin(np.arange(len(load_E)), experts_C)
                taken = int(np.where(lacked_E, share_E, -1.0).argmax())
                table_RC[rank, slot] = taken
                replicas_E[expert] -= 1
                replicas_E[taken] += 1
