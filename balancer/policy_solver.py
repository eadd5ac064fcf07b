"""The solver as a ``PlacementPolicy``. Imported on the worker thread only: numba takes a while.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C filled slots of the fullest rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal
from expertmesh.balancer.solver import Budget, LayerPlan, SolverOptions, Topology, evaluate, judge, solve_layer

Ints = NDArray[np.int32]

MIN_SAVING = 0.002
"""Weighted visits a token that a loaded slot has to save: below it a search moves slots for nothing."""


class SolverPolicy:
    """Searches jointly for balance and few visits, within the slots that are filled now: room that the operator left
    empty stays empty, for experts of servers that die."""

    def __init__(self, options: SolverOptions | None = None) -> None:
        self._options = options or SolverOptions()

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
        current_RW = np.array(current, np.int32).reshape(len(layout.room_R), layout.width)
        filled_RW = current_RW >= 0
        topology = Topology(slots_of_rank=tuple(filled_RW.sum(axis=1).tolist()), node_of_rank=_numbered(layout.node_R))
        current_S = _compact(current_RW, filled_RW, topology.width)
        counts = (statistics.load_E, statistics.coactivation_EE, topology)
        budget = None if max_loads is None else Budget(slots=max_loads, move_cost=MIN_SAVING)
        planned = solve_layer(*counts, self._options, current=current_S, budget=budget)
        now = evaluate(current_S, *counts)
        verdict = judge(
            now,
            planned,
            topology,
            tokens=statistics.tokens,
            top_k=float(statistics.load_E.sum()) / max(statistics.tokens, 1.0),
            dispersion=statistics.dispersion,
        )
        planned_RW = np.full_like(current_RW, -1)
        planned_RC = planned.slots.reshape(len(layout.room_R), topology.width)
        planned_RW[filled_RW] = planned_RC[np.arange(topology.width) < topology.room_R[:, None]]
        return Proposal(
            slots=tuple(planned_RW.ravel().tolist()),
            before=_prediction(now),
            after=_prediction(planned),
            gain=verdict.gain,
            noise=verdict.noise,
            worthwhile=verdict.worthwhile,
            num_loads=planned.num_loads,
        )


def _numbered(nodes: Sequence[str]) -> tuple[int, ...]:
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    return tuple(numbers[node] for node in nodes)


def _compact(table_RW: Ints, filled_RW: NDArray[np.bool_], width: int) -> Ints:
    """The filled slots of each rank moved together, int32 [R * C]."""
    table_RC = np.full((len(table_RW), width), -1, np.int32)
    table_RC[np.arange(width) < filled_RW.sum(axis=1)[:, None]] = table_RW[filled_RW]
    return table_RC.ravel()


def _prediction(plan: LayerPlan) -> Prediction:
    return Prediction(balancedness=plan.balancedness, fanout_ranks=plan.fanout_ranks, fanout_nodes=plan.fanout_nodes)
