"""Migrations that are under way: from the plan to the switch of every rank, or back to where it was.

    planned ──▶ staging ──▶ committing ──▶ committed
                   └───────────┴──▶ aborted (failed, late), dropped (the view is over)

Pure but for ``Effects``; time comes in as an argument. What a rank reports as committed is the truth, also after an
abort: the two may cross. A stream that broke in between is brought up to date when the rank is back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import Member
from expertmesh.balancer.migration import Ended, Migration, Outcome, Stage
from expertmesh.balancer.policy import Layout, Quotas
from expertmesh.balancer.source_quotas import quota_messages
from expertmesh.balancer.transfers import plan_transfers
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

DONE_KEPT = 1024
ABORTS_KEPT = 64


@dataclass(kw_only=True)
class _Abort:
    plan_id: int
    reason: str
    told: dict[str, int] = field(default_factory=dict)  # server id → on which stream


class Migrations:
    """
    Args:
        timeout_s: how long each stage may take.
    """

    def __init__(self, actual: Actual, *, effects: Effects, events: EventLog, timeout_s: float) -> None:
        self._actual = actual
        self._effects = effects
        self._events = events
        self._timeout_s = timeout_s
        self._running: dict[int, Migration] = {}
        self._aborts = deque(_Abort(plan_id=i, reason="the balancer restarted") for i in actual.ledger.plans)
        self._done: deque[int] = deque(maxlen=DONE_KEPT)
        self._view_number = actual.view.number
        self.ended: deque[Ended] = deque()
        self.num_committed = 0
        self.num_aborted = 0
        for plan in actual.ledger.plans.values():
            text = f"version {plan.placement.version}: the balancer restarted"
            events.add("migration_aborted", f"layer {plan.placement.layer}", text, logging.WARNING)

    def __iter__(self) -> Iterator[Migration]:
        return iter(self._running.values())

    def __len__(self) -> int:
        return len(self._running)

    def start(self, layer: int, slots: Sequence[int], quotas: Quotas, why: str, now: float) -> Migration:
        """Plan one layer's way to ``slots``; it is sent with the next tick.

        Args:
            slots: global slot → expert in the numbering of the current view.
            quotas: of the sources, or none.
            why: for the event.
        """
        actual = self._actual
        current = actual.layer_placement(layer)
        assert actual.phase is Phase.SERVING
        assert current is not None
        assert all(migration.layer != layer for migration in self), "one plan a layer at a time"
        plan = mesh_pb2.MigrationPlan(
            view_number=actual.view.number,
            placement=mesh_pb2.LayerPlacement(layer=layer, slots=slots, source_quotas=quota_messages(quotas)),
            transfers=plan_transfers(current.slots, slots, Layout.of(actual.view)),
            timeout_s=self._timeout_s,
        )
        actual.ledger.issue(plan, current.version)
        plan.traceparent = self._effects.migration_planned(plan, why)
        migration = Migration(
            plan=plan,
            ranks=frozenset(rank.server_id for rank in actual.view.ranks),
            started_s=now,
            stage_s=now,
            num_bytes=len(plan.transfers) * actual.model.bytes_per_expert,
        )
        self._running[plan.id] = migration
        self._events.add(
            "migration_planned",
            migration.subject,
            f"version {current.version} → {plan.placement.version}, {_amount(migration)}: {why}",
        )
        self._effects.save(actual.durable())
        return migration

    def tick(self, now: float) -> str | None:
        """Take the next action that is due. Returns what was done, None when nothing was."""
        for action in (self._hear, self._drop, self._advance, self._tell):
            done = action(now)
            if done is not None:
                return done
        return None

    # What ranks report.

    def _hear(self, now: float) -> str | None:
        """All that has come: the ranks speak at about the same time, and each round of the loop costs something."""
        statuses, heard = self._actual.statuses, []
        while statuses:
            heard.append(self._hear_one(*statuses.popleft()))
        return "; ".join(heard) or None

    def _hear_one(self, server_id: str, status: mesh_pb2.MigrationStatus) -> str:
        actual = self._actual
        plan = actual.ledger.plans.get(status.id)
        if plan is None:
            return self._hear_of_unknown(server_id, status)
        if plan.view_number != actual.view.number:
            return f"ignored the status of an old view's migration from {server_id}"
        migration = self._running.get(status.id)
        if status.phase == mesh_pb2.MIGRATION_PHASE_COMMITTED:
            self._believe(plan, server_id, status)
        if migration is None or server_id not in migration.ranks:
            return f"heard from {server_id} about migration {status.id}, which is over"
        if status.phase == mesh_pb2.MIGRATION_PHASE_STAGED:
            migration.from_checkpoint += 0 if server_id in migration.staged else status.from_checkpoint
            migration.staged.add(server_id)
        elif status.phase == mesh_pb2.MIGRATION_PHASE_COMMITTED:
            migration.committed.add(server_id)
            migration.step = status.step
        elif status.phase == mesh_pb2.MIGRATION_PHASE_FAILED:
            migration.failure = migration.failure or f"{server_id} failed: {status.reason or 'no reason given'}"
        return f"heard from {server_id} about migration {status.id}"

    def _hear_of_unknown(self, server_id: str, status: mesh_pb2.MigrationStatus) -> str:
        """A plan of a balancer that died before it was saved, or whose state is lost. A rank that switched brings what
        it runs when it registers again; one that staged would keep the layer until it forgets the plan."""
        member = self._actual.members.get(server_id)
        session = None if member is None else member.session
        if session is None or status.id in self._done:
            pass
        elif status.phase == mesh_pb2.MIGRATION_PHASE_COMMITTED:
            self._done.append(status.id)
            log.warning("%s switched by migration %d, which is unknown here", server_id, status.id)
            self._effects.close(session)
        elif status.phase == mesh_pb2.MIGRATION_PHASE_STAGED:
            abort = mesh_pb2.MigrationAbort(id=status.id, reason="the balancer does not know it")
            self._effects.send(session, mesh_pb2.JoinResponse(abort=abort))
        return f"heard from {server_id} about migration {status.id}, which is unknown"

    def _believe(self, plan: mesh_pb2.MigrationPlan, server_id: str, status: mesh_pb2.MigrationStatus) -> None:
        """A rank switched at a step that all ranks agreed on: this is the placement now."""
        current = self._actual.layer_placement(plan.placement.layer)
        if current is None or current.version >= plan.placement.version:
            return
        self._actual.set_layer_placement(plan.placement)
        if plan.id not in self._running:
            text = f"version {plan.placement.version} is in force since step {status.step}, says {server_id}"
            self._events.add("placement_adopted", f"layer {plan.placement.layer}", text + ": it was given up too late")
        self._effects.save(self._actual.durable())

    # What follows.

    def _drop(self, now: float) -> str | None:
        """Plans are valid in their view only, and a view that broke switches no more."""
        actual = self._actual
        if actual.view.number != self._view_number:
            self._view_number = actual.view.number
            self._aborts.clear()
            for plan_id in [i for i, plan in actual.ledger.plans.items() if plan.view_number < actual.view.number]:
                del actual.ledger.plans[plan_id]
        gone = [
            migration
            for migration in self
            if actual.phase is not Phase.SERVING or migration.plan.view_number != actual.view.number
        ]
        for migration in gone:
            self._end(migration, Outcome.DROPPED, f"view {migration.plan.view_number} is over", now)
        return f"dropped {len(gone)} migrations" if gone else None

    def _advance(self, now: float) -> str | None:
        for migration in list(self):
            late_s = now - migration.stage_s
            if migration.committed >= migration.ranks:
                return self._end(migration, Outcome.COMMITTED, "", now)
            if migration.failure and not migration.committed:
                return self._end(migration, Outcome.ABORTED, migration.failure, now)
            if migration.stage is Stage.PLANNED:
                return self._enter(migration, Stage.STAGING, f"{len(migration.ranks)} ranks get the plan", now)
            if migration.stage is Stage.STAGING and migration.staged >= migration.ranks:
                return self._enter(migration, Stage.COMMITTING, f"all staged after {late_s:.2f} s", now)
            if late_s > self._timeout_s:
                return self._give_up(migration, now)
        return None

    def _give_up(self, migration: Migration, now: float) -> str:
        """The watchdog of a stage."""
        if migration.committed:
            silent = ", ".join(sorted(migration.ranks - migration.committed))
            return self._end(migration, Outcome.COMMITTED, f"{silent} did not say so within the time-out", now)
        heard = migration.staged if migration.stage is Stage.STAGING else migration.committed
        silent = ", ".join(sorted(migration.ranks - heard))
        why = f"{migration.stage} took longer than {self._timeout_s:g} s: nothing from {silent}"
        return self._end(migration, Outcome.ABORTED, why, now)

    def _enter(self, migration: Migration, stage: Stage, text: str, now: float) -> str:
        self._effects.migration_stage(migration.plan.id, migration.stage, now - migration.stage_s)
        migration.stage, migration.stage_s = stage, now
        version = migration.plan.placement.version
        self._events.add(f"migration_{stage}", migration.subject, f"version {version}: {text}")
        return f"{migration.subject} is {stage}"

    def _end(self, migration: Migration, outcome: Outcome, reason: str, now: float) -> str:
        plan = migration.plan
        del self._running[plan.id]
        self._effects.migration_stage(plan.id, migration.stage, now - migration.stage_s)
        self._effects.migration_ended(plan.id, outcome, reason)
        took = f"after {now - migration.started_s:.2f} s"
        why = f": {reason}" if reason else ""
        if outcome is Outcome.COMMITTED:
            self.num_committed += 1
            self._done.append(plan.id)
            self._actual.ledger.plans.pop(plan.id, None)
            fallback = f", {migration.from_checkpoint} from the checkpoint" if migration.from_checkpoint else ""
            text = f"version {plan.placement.version} at step {migration.step} {took}, {_amount(migration)}{fallback}"
            self._events.add("migration_committed", migration.subject, text + why)
        else:
            self.num_aborted += 1
            text = f"version {plan.placement.version} while {migration.stage} {took}{why}"
            self._events.add(f"migration_{outcome}", migration.subject, text, logging.WARNING)
            if outcome is Outcome.ABORTED:
                self._remember_abort(plan.id, reason)
        self._effects.save(self._actual.durable())
        self.ended.append(Ended(layer=migration.layer, outcome=outcome, reason=reason))
        return f"{migration.subject} {outcome}"

    def _remember_abort(self, plan_id: int, reason: str) -> None:
        self._aborts.append(_Abort(plan_id=plan_id, reason=reason))
        while len(self._aborts) > ABORTS_KEPT:
            self._actual.ledger.plans.pop(self._aborts.popleft().plan_id, None)

    def _tell(self, now: float) -> str | None:
        """Bring every open stream of the view up to date."""
        if self._actual.phase is not Phase.SERVING:
            return None
        told = 0
        for member in self._actual.members.live():
            if member.session is None or not self._has_news(member.server_id, member.session):
                continue  # the usual case, in every round of the loop
            if self._actual.is_in_view(member) and self._actual.is_ready(member):
                told += sum(self._tell_plan(member, member.session, migration) for migration in self)
                told += sum(self._tell_abort(member, member.session, abort) for abort in self._aborts)
        return f"sent {told} messages about migrations" if told else None

    def _has_news(self, server_id: str, session: int) -> bool:
        return any(
            migration.stage is not Stage.PLANNED and migration.told.get(server_id) != (session, migration.stage)
            for migration in self
        ) or any(abort.told.get(server_id) != session for abort in self._aborts)

    def _tell_plan(self, member: Member, session: int, migration: Migration) -> bool:
        known = migration.told.get(member.server_id)
        if migration.stage is Stage.PLANNED or known == (session, migration.stage):
            return False
        if known is None or known[0] != session:
            self._effects.send(session, mesh_pb2.JoinResponse(plan=migration.plan))
        if migration.stage is Stage.COMMITTING:
            commit = mesh_pb2.MigrationCommit(id=migration.plan.id)
            self._effects.send(session, mesh_pb2.JoinResponse(commit=commit))
        migration.told[member.server_id] = (session, migration.stage)
        return True

    def _tell_abort(self, member: Member, session: int, abort: _Abort) -> bool:
        if abort.told.get(member.server_id) == session:
            return False
        message = mesh_pb2.MigrationAbort(id=abort.plan_id, reason=abort.reason)
        self._effects.send(session, mesh_pb2.JoinResponse(abort=message))
        abort.told[member.server_id] = session
        return True


def _amount(migration: Migration) -> str:
    loads = migration.num_loads
    return f"{loads} slot{'' if loads == 1 else 's'} to load, {migration.num_bytes / 1e6:.3g} MB"
