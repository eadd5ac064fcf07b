"""The migrations of one view as one of its ranks keeps them: what was announced, what is staged, what may switch.

    plan ──▶ staging ──▶ staged ──▶ listed (commit heard) ──▶ switched
               └──────────┴───────────┴──▶ dropped (abort, failure, too late, end of the view)

A rank lists a migration in the lockstep before a step; when every rank lists it, all of them switch before that step.
So a listing binds for that step only, and a rank may drop a plan at any other time: then nobody switches.

Thread-safe: plans come in on the event loop, a worker stages them, the step thread lists and switches.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertmesh.mesh.halves import ExpertWeights, SlotChange
from expertmesh.mesh.placement import LayerRouting
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

SWITCHED_KEPT = 256
"""Switches remembered, so that a commit that comes again is answered."""

LIFETIME_IN_TIMEOUTS = 3
"""A plan of which nothing was heard for so many of its time-outs was forgotten by the balancer: staging and committing
may take one each."""


class PlanRefusedError(ValueError):
    """A plan that does not fit what this rank runs."""


@dataclass(eq=False)
class Migration:
    """One plan on this rank. The worker fills it in up to ``staged``; from then on it is only read.

    ``called_off`` ends every wait of its transfers. ``outcome`` is empty while it lives. Times: ``received_s`` is
    monotonic, ``received_ns`` wall time for the trace.
    """

    plan: mesh_pb2.MigrationPlan
    received_s: float
    received_ns: int
    called_off: threading.Event = field(default_factory=threading.Event)
    is_staged: bool = False
    commit_heard: bool = False
    outcome: str = ""
    routing: LayerRouting | None = None
    changes: Sequence[SlotChange] = ()
    staged: Sequence[ExpertWeights] = ()
    came_from: list[str] = field(default_factory=list)  # by arriving expert: local, peer or checkpoint
    num_fallbacks: int = 0
    staged_status: mesh_pb2.MigrationStatus | None = None
    staged_ns: int = 0  # wall time, as the next
    switched_ns: int = 0
    switch_seconds: float = 0.0
    finished_as: str = ""  # the outcome that was accounted for

    @property
    def id(self) -> int:
        return self.plan.id

    @property
    def layer(self) -> int:
        return self.plan.placement.layer

    @property
    def deadline_s(self) -> float:
        """When it has to be staged."""
        return self.received_s + self.plan.timeout_s


class MigrationBook:
    """
    Args:
        view: as it begins; ``view`` is as it runs, with the placements that were switched to.
        clock: monotonic seconds.
    """

    def __init__(self, view: ViewInfo, num_experts: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.view = view
        self._num_experts = num_experts
        self._clock = clock
        self._lock = threading.Lock()
        self._live: dict[int, Migration] = {}
        self._listed: dict[int, Migration] = {}  # for the step that is being agreed on
        self._switched: OrderedDict[int, int] = OrderedDict()  # id → step
        self._num_ready = 0

    # -- from the event loop ------------------------------------------------------------------------------------

    def open(self, plan: mesh_pb2.MigrationPlan) -> Migration | None:
        """A new migration to be staged; None when the plan is known already.

        Raises:
            PlanRefusedError: the plan is not one for this view as it runs; nothing has changed.
        """
        with self._lock:
            if plan.id in self._live or plan.id in self._switched:
                return None
            for other in (*self._live.values(), *self._listed.values()):
                if other.layer == plan.placement.layer:
                    raise PlanRefusedError(f"layer {other.layer} has migration {other.id} under way")
            check_plan(plan, self.view, self._num_experts)
            migration = Migration(plan, self._clock(), time.time_ns())
            self._live[plan.id] = migration
            return migration

    def supersede(self, plan: mesh_pb2.MigrationPlan) -> list[Migration]:
        """Drop older plans for the layer of this one: a balancer has one at a time and never reuses an id, so it has
        forgotten them, by a death before they were saved. One whose switch is being agreed on stays."""
        with self._lock:
            old = [
                migration.id
                for migration in self._live.values()
                if migration.layer == plan.placement.layer
                and migration.id < plan.id
                and migration.id not in self._listed
                and plan.view_number == self.view.number
            ]
            return [dropped for i in old if (dropped := self._drop(i, "superseded")) is not None]

    def status(self, migration_id: int) -> mesh_pb2.MigrationStatus | None:
        """How far a migration is, to be said again; None while it is being staged or when it is unknown."""
        with self._lock:
            if migration_id in self._switched:
                return _committed(migration_id, self._switched[migration_id])
            migration = self._live.get(migration_id)
            return migration.staged_status if migration is not None else None

    def commit(self, migration_id: int) -> bool:
        """The balancer lets it switch; False when it is not known, or known no longer."""
        with self._lock:
            migration = self._live.get(migration_id)
            if migration is None:
                return migration_id in self._switched
            migration.commit_heard = True
            self._count_ready()
            return True

    def drop(self, migration_id: int, outcome: str) -> Migration | None:
        """Give one up; None when it is not known, or switched already. A switch that is being agreed on may follow."""
        with self._lock:
            return self._drop(migration_id, outcome)

    # -- from the worker ----------------------------------------------------------------------------------------

    def staged(self, migration: Migration, status: mesh_pb2.MigrationStatus) -> bool:
        """It can switch as soon as the commit is heard; False when it was dropped meanwhile."""
        with self._lock:
            if migration.outcome:
                return False
            migration.is_staged = True
            migration.staged_status = status
            self._count_ready()
            return True

    def drop_forgotten(self) -> list[Migration]:
        """Drop what the balancer must have forgotten."""
        with self._lock:
            now = self._clock()
            forgotten = [
                migration.id
                for migration in self._live.values()
                if now > migration.received_s + LIFETIME_IN_TIMEOUTS * migration.plan.timeout_s
            ]
            return [dropped for i in forgotten if (dropped := self._drop(i, "forgotten")) is not None]

    def drop_all(self, outcome: str) -> list[Migration]:
        with self._lock:
            return [dropped for i in list(self._live) if (dropped := self._drop(i, outcome)) is not None]

    # -- from the step thread -----------------------------------------------------------------------------------

    def listed(self) -> Sequence[int]:
        """The migrations that this rank is ready to switch to before the next step."""
        if self._num_ready or self._listed:  # the usual case, once a step, takes no lock
            with self._lock:
                ready = (m for m in self._live.values() if m.is_staged and m.commit_heard)
                self._listed.update((migration.id, migration) for migration in ready)
        return sorted(self._listed)

    def switch(self, ids: Sequence[int], step: int) -> list[Migration]:
        """The step is agreed on: these go live before it, in order. What else was listed is free again."""
        if not self._listed:
            assert not ids, f"step {step} switches to {ids}, which this rank never listed"
            return []
        with self._lock:
            assert all(i in self._listed for i in ids), (
                f"step {step} switches to {ids}, listed are {list(self._listed)}"
            )
            migrations = [self._listed[i] for i in ids]
            self._listed.clear()
            for migration in migrations:
                assert migration.plan.placement.version > self.view.versions[migration.layer]
                self._live.pop(migration.id, None)
                migration.outcome = "committed"
                self._switched[migration.id] = step
                if len(self._switched) > SWITCHED_KEPT:
                    self._switched.popitem(last=False)
            if migrations:
                self.view = self.view.switched([migration.plan.placement for migration in migrations])
                self._count_ready()
            return migrations

    # -- under the lock -----------------------------------------------------------------------------------------

    def _drop(self, migration_id: int, outcome: str) -> Migration | None:
        migration = self._live.pop(migration_id, None)
        if migration is not None:
            migration.outcome = outcome
            migration.called_off.set()
            self._count_ready()
        return migration

    def _count_ready(self) -> None:
        self._num_ready = sum(m.is_staged and m.commit_heard for m in self._live.values())


def committed_status(migration: Migration, step: int) -> mesh_pb2.MigrationStatus:
    """What a rank reports after the switch."""
    status = _committed(migration.id, step)
    status.seconds = migration.switch_seconds
    return status


def _committed(migration_id: int, step: int) -> mesh_pb2.MigrationStatus:
    return mesh_pb2.MigrationStatus(id=migration_id, phase=mesh_pb2.MIGRATION_PHASE_COMMITTED, step=step)


def check_plan(plan: mesh_pb2.MigrationPlan, view: ViewInfo, num_experts: int) -> None:
    """Whether a plan leads from the placement that runs to the one that it says.

    Raises:
        PlanRefusedError: it does not; the message says why.
    """
    if plan.view_number != view.number:
        raise PlanRefusedError(f"it is for view {plan.view_number}, this rank is in view {view.number}")
    new = plan.placement
    old = next((layer for layer in view.proto.placement if layer.layer == new.layer), None)
    if old is None:
        raise PlanRefusedError(f"layer {new.layer} has no experts")
    if new.version <= old.version:
        raise PlanRefusedError(f"layer {new.layer} runs version {old.version}, the plan's is {new.version}")
    _check_slots(new.slots, old.slots, view, num_experts)
    _check_transfers(plan.transfers, new.slots, old.slots)


def _check_slots(new: Sequence[int], old: Sequence[int], view: ViewInfo, num_experts: int) -> None:
    if len(new) != len(old):
        raise PlanRefusedError(f"it has {len(new)} slots, the view {len(old)}")
    if not all(-1 <= expert < num_experts for expert in new):
        raise PlanRefusedError(f"it names an expert outside 0..{num_experts - 1}")
    missing = sorted(set(range(num_experts)).difference(new))
    if missing:
        raise PlanRefusedError(f"experts {missing} have no slot")
    for index, rank in enumerate(view.expert_ranks):
        first, room = index * view.slots_per_rank, view.proto.ranks[rank].num_slots
        if any(expert >= 0 for expert in new[first + room : first + view.slots_per_rank]):
            raise PlanRefusedError(f"rank {rank} has room for {room} experts a layer")


def _check_transfers(transfers: Sequence[mesh_pb2.SlotTransfer], new: Sequence[int], old: Sequence[int]) -> None:
    changed = {slot for slot, expert in enumerate(new) if expert >= 0 and expert != old[slot]}
    named = [transfer.slot for transfer in transfers]
    if sorted(named) != sorted(changed):
        raise PlanRefusedError(f"slots {sorted(changed)} change, but transfers go to {sorted(named)}")
    for transfer in transfers:
        if transfer.expert != new[transfer.slot]:
            raise PlanRefusedError(
                f"the transfer to slot {transfer.slot} brings expert {transfer.expert} instead of {new[transfer.slot]}"
            )
        if transfer.HasField("source_slot"):
            source = transfer.source_slot
            if source >= len(old) or old[source] != transfer.expert:
                raise PlanRefusedError(f"slot {source} does not hold expert {transfer.expert}")
