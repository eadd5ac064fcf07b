"""The solver as a ``PlacementPolicy``. Imported on the worker thread only: numba takes a while.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C usable slots of the widest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal
from expertmesh.balancer.replicas import ANY_REPLICAS, ReplicaRule, hold, restore
from expertmesh.balancer.solver import (
    Budget,
    LayerPlan,
    SolverOptions,
    Topology,
    evaluate,
    judge,
    solve_layer,
)

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

PROPOSALS_A_SLOT = 200
"""Length of a search that changes a few slots of a placement; a placement made afresh is searched for longer."""
MIN_SAVING = 0.002
"""Weighted visits a token that a loaded slot has to save: below it a search moves slots for nothing."""


class SolverPolicy:
    """Searches jointly for balance and few visits. Empty slots take replicas where those pay; none is emptied.

    Args:
        max_filled: slots of a layer that may hold an expert, over all ranks; more only where more do already. None =
            all that there are.
        rule: replicas that experts have at least, as far as the slots go.
    """

    def __init__(
        self,
        options: SolverOptions | None = None,
        *,
        max_filled: int | None = None,
        rule: ReplicaRule = ANY_REPLICAS,
    ) -> None:
        self._options = options or SolverOptions()
        self._max_filled = max_filled
        self._rule = rule

    def compile(self) -> None:
        """Have every kernel compiled, or loaded from the cache of an earlier process: two tiny problems."""
        layout = Layout(width=2, room_R=(2, 2), node_R=("a", "b"), server_R=("a", "b"))
        pairs_EE = np.ones((3, 3)) - np.eye(3)
        for coactivation_EE in (pairs_EE, None):
            counts = LayerStatistics(tokens=9.0, load_E=np.array([3.0, 2, 1]), coactivation_EE=coactivation_EE)
            for max_loads in (1, None):
                self.propose(counts, layout, (0, 1, 0, 2), max_loads)

    def propose(
        self, statistics: LayerStatistics, layout: Layout, current: Sequence[int], max_loads: int | None
    ) -> Proposal:
        """See ``PlacementPolicy``."""
        load_E = statistics.load_E
        current_RW = np.array(current, np.int32).reshape(len(layout.room_R), layout.width)
        usable_RW = usable_slots(current_RW >= 0, np.minimum(layout.room_R, len(load_E)), self._max_filled)
        topology = Topology(
            slots_of_rank=tuple(usable_RW.sum(axis=1).tolist()), node_of_rank=node_numbers(layout.node_R)
        )
        current_S = compact(current_RW, usable_RW, topology.width)
        counts = (load_E, statistics.coactivation_EE, topology)
        budget = None if max_loads is None else Budget(slots=max_loads, move_cost=MIN_SAVING)
        floor_E = floors_of(self._rule, current_RW, load_E, int(usable_RW.sum()))
        options = self._options if max_loads is None else short_search(self._options, topology.num_slots)
        planned = solve_layer(*counts, options, current=current_S, budget=budget, floor_E=floor_E)
        planned_RW = np.full_like(current_RW, -1)
        planned_RC = planned.slots.reshape(len(layout.room_R), topology.width)
        if max_loads is None and self._rule.asks_for_any:  # packing may have dropped some
            planned_RC = restore(planned_RC, topology.slots_of_rank, floor_E.astype(np.int64))
            planned = evaluate(planned_RC.ravel(), *counts, current=current_S)
        planned_RW[usable_RW] = planned_RC[np.arange(topology.width) < topology.room_R[:, None]]
        now = evaluate(current_S, *counts)
        verdict = judge(
            now,
            planned,
            topology,
            tokens=statistics.tokens,
            top_k=float(load_E.sum()) / max(statistics.tokens, 1.0),
            dispersion=statistics.dispersion,
        )
        return Proposal(
            slots=tuple(planned_RW.ravel().tolist()),
            before=prediction_of(now),
            after=prediction_of(planned),
            gain=verdict.gain,
            noise=verdict.noise,
            worthwhile=verdict.worthwhile,
            num_loads=planned.num_loads,
        )


def floors_of(rule: ReplicaRule, current_RW: Ints, load_E: NDArray[np.float64], num_slots: int) -> Ints:
    """Replicas that ``rule`` asks for when ``num_slots`` can be filled, int32 [E]."""
    held_E = hold(current_RW, len(current_RW), len(load_E)).sum(axis=0)
    return rule.floors(held_E, load_E, num_slots, len(current_RW)).astype(np.int32)


def short_search(options: SolverOptions, num_slots: int) -> SolverOptions:
    return replace(options, proposals=min(options.proposals, PROPOSALS_A_SLOT * num_slots))


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


def compact(table_RW: Ints, usable_RW: Bools, width: int) -> Ints:
    """The usable slots of each rank moved together, int32 [R * C]."""
    table_RC = np.full((len(table_RW), width), -1, np.int32)
    table_RC[np.arange(width) < usable_RW.sum(axis=1)[:, None]] = table_RW[usable_RW]
    return table_RC.ravel()


def prediction_of(plan: LayerPlan) -> Prediction:
    """What the solver expects of a placement."""
    return Prediction(balancedness=plan.balancedness, fanout_ranks=plan.fanout_ranks, fanout_nodes=plan.fanout_nodes)
