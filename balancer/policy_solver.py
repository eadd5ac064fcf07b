"""The solver as a ``PlacementPolicy``. Imported on the worker thread only: numba takes a while.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C usable slots of the widest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from expertmesh.balancer.policy import LayerStatistics, Layout, Proposal
from expertmesh.balancer.policy_tables import Tables
from expertmesh.balancer.replicas import ANY_REPLICAS, ReplicaRule, restore
from expertmesh.balancer.solver import (
    Budget,
    SolverOptions,
    evaluate,
    solve_layer,
)

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
        tables = Tables.of(layout, current, len(load_E), self._max_filled)
        topology, current_S = tables.topology, tables.current_RC.ravel()
        counts = (load_E, statistics.coactivation_EE, topology)
        budget = None if max_loads is None else Budget(slots=max_loads, move_cost=MIN_SAVING)
        floor_E = tables.floors(self._rule, load_E)
        options = self._options if max_loads is None else short_search(self._options, topology.num_slots)
        planned = solve_layer(*counts, options, current=current_S, budget=budget, floor_E=floor_E)
        planned_RC = planned.slots.reshape(topology.num_ranks, topology.width)
        if max_loads is None and self._rule.asks_for_any:  # packing may have dropped some
            planned_RC = restore(planned_RC, topology.slots_of_rank, floor_E.astype(np.int64))
            planned = evaluate(planned_RC.ravel(), *counts, current=current_S)
        known = evaluate(current_S, *counts), planned
        return tables.propose(planned_RC, statistics, judged=known, shown=known)


def short_search(options: SolverOptions, num_slots: int) -> SolverOptions:
    return replace(options, proposals=min(options.proposals, PROPOSALS_A_SLOT * num_slots))
