"""The solver as a ``PlacementPolicy``. Imported on the worker thread only: numba takes a while.

Dimensions: R expert ranks, W slots of a rank in the view's numbering, C usable slots of the widest rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal
from expertmesh.balancer.solver import (
    Budget,
    LayerPlan,
    SolverOptions,
    Topology,
    Verdict,
    evaluate,
    judge,
    solve_layer,
)
from expertmesh.balancer.solver.expected import balancedness, replica_shares
from expertmesh.balancer.solver.quotas import balanced_quotas, quota_loads

Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

MIN_SAVING = 0.002
"""Weighted visits a token that a loaded slot has to save: below it a search moves slots for nothing."""
MIN_QUOTA_GAIN = 0.01
"""Below this no gain is worth a new version of a placement, though it loads nothing."""
LEAST_SHIFT = 0.01
"""Quotas that are all closer than this to equal shares are equal shares."""


class SolverPolicy:
    """Searches jointly for balance and few visits. Empty slots take replicas where those pay; none is emptied.

    Args:
        max_filled: slots of a layer that may hold an expert, over all ranks; more only where more do already. None =
            all that there are.
        replica_quotas: replicas get unequal shares where that levels the ranks; a change of quotas loads nothing and
            comes before one of slots that brings little more.
    """

    def __init__(
        self, options: SolverOptions | None = None, *, max_filled: int | None = None, replica_quotas: bool = False
    ) -> None:
        self._options = options or SolverOptions()
        self._max_filled = max_filled
        self._replica_quotas = replica_quotas

    def compile(self) -> None:
        """Have every kernel compiled, or loaded from the cache of an earlier process: two tiny problems."""
        layout = Layout(width=2, room_R=(2, 2), node_R=("a", "b"), server_R=("a", "b"))
        pairs_EE = np.ones((3, 3)) - np.eye(3)
        for coactivation_EE in (pairs_EE, None):
            counts = LayerStatistics(tokens=9.0, load_E=np.array([3.0, 2, 1]), coactivation_EE=coactivation_EE)
            for max_loads in (1, None):
                self.propose(counts, layout, (0, 1, 0, 2), max_loads)
        balanced_quotas(np.array([[0, 1], [0, 2]], np.int32), np.ones(3))

    def propose(
        self,
        statistics: LayerStatistics,
        layout: Layout,
        current: Sequence[int],
        max_loads: int | None,
        quotas: Sequence[float] = (),
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
        planned = solve_layer(*counts, self._options, current=current_S, budget=budget)
        planned_RW = np.full_like(current_RW, -1)
        planned_RC = planned.slots.reshape(len(layout.room_R), topology.width)
        planned_RW[usable_RW] = planned_RC[np.arange(topology.width) < topology.room_R[:, None]]
        now = evaluate(current_S, *counts)
        choice = Choice(statistics, topology, Option(current_RW, now, tuple(quotas)).shared(load_E))
        if not self._replica_quotas:
            return choice.proposal(Option(planned_RW, planned))
        here, there = (
            Option(table_RW, plan, quotas_of(table_RW, load_E)).shared(load_E)
            for table_RW, plan in ((current_RW, now), (planned_RW, planned))
        )
        if max_loads is not None and not choice.judge(here, there).worthwhile and choice.is_better_shared(here):
            return choice.proposal(here)
        return choice.proposal(there)


@dataclass(frozen=True, slots=True)
class Option:
    """A placement and what it is predicted to do with its ``quotas``; empty = equal shares."""

    table_RW: Ints
    plan: LayerPlan
    quotas: tuple[float, ...] = ()

    def shared(self, load_E: NDArray[np.float64]) -> Option:
        """With the balancedness that the quotas make."""
        if not self.quotas:
            return self
        quota_RW = np.array(self.quotas).reshape(self.table_RW.shape)
        balance = balancedness(quota_loads(self.table_RW, quota_RW, load_E))
        return replace(self, plan=replace(self.plan, balancedness=balance))


@dataclass(frozen=True, slots=True)
class Choice:
    """Weighs what could be against what is (``now``)."""

    statistics: LayerStatistics
    topology: Topology
    now: Option

    def judge(self, before: Option, after: Option) -> Verdict:
        return judge(
            before.plan,
            after.plan,
            self.topology,
            tokens=self.statistics.tokens,
            top_k=float(self.statistics.load_E.sum()) / max(self.statistics.tokens, 1.0),
            dispersion=self.statistics.dispersion,
        )

    def is_better_shared(self, here: Option) -> bool:
        """Whether other quotas alone bring more than noise. They cost no transfer, and concern no visits."""
        before, after = (
            replace(o, plan=replace(o.plan, fanout_ranks=None, fanout_nodes=None)) for o in (self.now, here)
        )
        verdict = self.judge(before, after)
        return verdict.gain > verdict.noise + MIN_QUOTA_GAIN

    def proposal(self, after: Option) -> Proposal:
        verdict = self.judge(self.now, after)
        only_quotas = np.array_equal(after.table_RW, self.now.table_RW) and after.quotas != self.now.quotas
        return Proposal(
            slots=tuple(after.table_RW.ravel().tolist()),
            before=prediction_of(self.now.plan),
            after=prediction_of(after.plan),
            gain=verdict.gain,
            noise=verdict.noise,
            worthwhile=verdict.worthwhile or (only_quotas and self.is_better_shared(after)),
            num_loads=after.plan.num_loads,
            quotas=after.quotas,
        )


def quotas_of(table_RW: Ints, load_E: NDArray[np.float64]) -> tuple[float, ...]:
    """Global slot → share of its expert's tokens; empty where all shares are about equal."""
    quota_RW = balanced_quotas(table_RW, load_E)
    equal_RW = replica_shares(table_RW, len(load_E))[np.arange(len(table_RW))[:, None], table_RW]
    if np.abs(np.where(table_RW >= 0, quota_RW - equal_RW, 0.0)).max() < LEAST_SHIFT:
        return ()
    return tuple(quota_RW.ravel().tolist())


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
