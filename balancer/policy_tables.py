"""Between the tables of a view, whose ranks have empty slots anywhere, and those that algorithms work on.

Imported on the worker thread only: numba takes a while.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C usable slots of the widest rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal
from expertmesh.balancer.replicas import ReplicaRule, hold
from expertmesh.balancer.solver import LayerPlan, Topology, judge

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Tables:
    """The slots of one layer that a proposal may fill. ``current_RW``: expert by slot of the view, -1 = empty."""

    current_RW: Ints
    usable_RW: Bools
    topology: Topology

    @classmethod
    def of(cls, layout: Layout, current: Sequence[int], num_experts: int, max_filled: int | None) -> Tables:
        """``max_filled``: slots that may hold an expert, over all ranks; None = all that there are."""
        current_RW = np.array(current, np.int32).reshape(len(layout.room_R), layout.width)
        usable_RW = usable_slots(current_RW >= 0, np.minimum(layout.room_R, num_experts), max_filled)
        topology = Topology(
            slots_of_rank=tuple(usable_RW.sum(axis=1).tolist()), node_of_rank=node_numbers(layout.node_R)
        )
        return cls(current_RW, usable_RW, topology)

    @property
    def current_RC(self) -> Ints:
        """The usable slots of each rank moved together."""
        table_RC = np.full((len(self.current_RW), self.topology.width), -1, np.int32)
        table_RC[self._is_slot_RC] = self.current_RW[self.usable_RW]
        return table_RC

    @property
    def _is_slot_RC(self) -> Bools:
        is_slot_RC: Bools = np.arange(self.topology.width) < self.topology.room_R[:, None]
        return is_slot_RC

    def floors(self, rule: ReplicaRule, load_E: Floats) -> Ints:
        """Replicas that ``rule`` asks for when the usable slots can be filled, int32 [E]."""
        num_ranks = len(self.current_RW)
        held_E = hold(self.current_RW, num_ranks, len(load_E)).sum(axis=0)
        return rule.floors(held_E, load_E, int(self.usable_RW.sum()), num_ranks).astype(np.int32)

    def propose(
        self,
        planned_RC: Ints,
        statistics: LayerStatistics,
        *,
        judged: tuple[LayerPlan, LayerPlan],
        shown: tuple[LayerPlan, LayerPlan],
    ) -> Proposal:
        """A planned table, as the view numbers its slots.

        Args:
            judged: what runs and what is planned, as far as the decision goes.
            shown: the same as people see it.
        """
        now, planned = judged
        verdict = judge(
            now,
            planned,
            self.topology,
            tokens=statistics.tokens,
            top_k=float(statistics.load_E.sum()) / max(statistics.tokens, 1.0),
            dispersion=statistics.dispersion,
        )
        planned_RW = np.full_like(self.current_RW, -1)
        planned_RW[self.usable_RW] = planned_RC[self._is_slot_RC]
        before, after = map(_prediction_of, shown)
        return Proposal(
            slots=tuple(planned_RW.ravel().tolist()),
            before=before,
            after=after,
            gain=verdict.gain,
            noise=verdict.noise,
            worthwhile=verdict.worthwhile,
            num_loads=planned.num_loads,
        )


def node_numbers(nodes: Sequence[str]) -> tuple[int, ...]:
    """Nodes numbered in the order in which they are named first."""
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    return tuple(numbers[node] for node in nodes)


def usable_slots(filled_RW: Bools, room_R: NDArray[np.int64], max_filled: int | None) -> Bools:
    """The filled slots and the first empty ones of each rank, bool [R, W]: as even over the ranks as their room
    allows, up to ``max_filled`` in all."""
    slots_R = filled_RW.sum(axis=1)
    most = int(room_R.sum()) if max_filled is None else max_filled
    while slots_R.sum() < most and (slots_R < room_R).any():
        slots_R[np.where(slots_R < room_R, slots_R, filled_RW.shape[1] + 1).argmin()] += 1
    added_R = slots_R - filled_RW.sum(axis=1)
    usable_RW: Bools = filled_RW | (~filled_RW & (np.cumsum(~filled_RW, axis=1) <= added_R[:, None]))
    return usable_RW


def _prediction_of(plan: LayerPlan) -> Prediction:
    """What is expected of a placement."""
    return Prediction(balancedness=plan.balancedness, fanout_ranks=plan.fanout_ranks, fanout_nodes=plan.fanout_nodes)
