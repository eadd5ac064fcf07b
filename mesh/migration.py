"""Migrations on one rank: a thread stages what plans ask for beside the step loop, which switches between two steps.

Expert ranks stage the experts that come to their slots: a copy from another slot of their own, weights from a peer over
the side group, else the checkpoint. Attention ranks build the layer's routing table. A plan that cannot be staged, or
not in time, is reported and changes nothing.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from opentelemetry import trace

from expertmesh.mesh.background import preempt_nobody
from expertmesh.mesh.device import CPU, beside_steps
from expertmesh.mesh.halves import ExpertHalf, SlotChange
from expertmesh.mesh.migration_book import Migration, MigrationBook, PlanRefusedError, committed_status
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.sidegroup import Give, Patience, SideGroup, Take
from expertmesh.mesh.telemetry import Telemetry, context_from_traceparent, is_sampled, record_span
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

_FORGOTTEN_CHECK_S = 1.0

LOCAL, PEER, CHECKPOINT = "local", "peer", "checkpoint"


@dataclass(frozen=True, kw_only=True)
class MigrationContext:
    """What the migrations of one view work with.

    ``routing`` is None on a rank that routes nothing, ``experts`` on one without slots, ``side`` on the only one with
    slots. ``report`` is thread-safe; ``wake`` ends the step thread's wait.
    """

    view: ViewInfo
    num_experts: int
    experts: ExpertHalf | None
    routing: RoutingTables | None
    side: SideGroup | None
    report: Callable[[mesh_pb2.JoinRequest], None]
    wake: Callable[[], None]
    telemetry: Telemetry
    device: torch.device = CPU


class _CalledOffError(Exception):
    """Whoever called it off knows why."""


class Migrations:
    """The migrations of one view on one rank; ``start`` it once, ``call_off`` when the view is over."""

    LONGEST_JOIN_S = 2.0
    """How long ``close`` may take."""

    def __init__(self, context: MigrationContext) -> None:
        self._c = context
        self._metrics = context.telemetry.metrics
        self._book = MigrationBook(context.view, context.num_experts)
        self._work: queue.SimpleQueue[Migration | None] = queue.SimpleQueue()
        name = f"migrations of view {context.view.number}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def view(self) -> ViewInfo:
        """As it runs: with the placements that were switched to."""
        return self._book.view

    def start(self) -> None:
        self._thread.start()

    def call_off(self) -> None:
        """Drop what has not switched; the thread ends by itself, in its own time.

        Nothing of the next view may wait for it: it may be reading from a checkpoint on a slow disk. What it still
        reads from slots that change goes nowhere.
        """
        for migration in self._book.drop_all("view_ended"):
            self._dropped(migration)
        self._work.put(None)

    def close(self) -> None:
        """Call off, and see the thread end: soon, unless it hangs in a read from the checkpoint."""
        self.call_off()
        self._thread.join(self.LONGEST_JOIN_S)
        if self._thread.is_alive():
            log.error("view %d: the thread that stages weights does not end", self._c.view.number)

    # -- event loop ---------------------------------------------------------------------------------------------

    def hear(self, message: mesh_pb2.JoinResponse) -> None:
        """A plan, a commit or an abort from the balancer. What comes again is answered again."""
        kind = message.WhichOneof("message")
        if kind == "plan":
            self._hear_plan(message.plan)
        elif kind == "commit":
            self._hear_commit(message.commit.id)
        elif kind == "abort":
            self._hear_abort(message.abort)

    def _hear_plan(self, plan: mesh_pb2.MigrationPlan) -> None:
        for old in self._book.supersede(plan):
            log.warning("migration %d of layer %d gives way to migration %d", old.id, old.layer, plan.id)
            self._dropped(old)
        try:
            migration = self._book.open(plan)
        except PlanRefusedError as error:
            log.warning("migration %d refused: %s", plan.id, error)
            self._metrics.rank_migrations.add(outcome="refused")
            self._report(failed_status(plan.id, str(error)))
            return
        if migration is not None:
            self._work.put(migration)
            return
        log.info("migration %d was announced before", plan.id)
        self._say_again(plan.id)

    def _hear_commit(self, migration_id: int) -> None:
        if not self._book.commit(migration_id):
            log.warning("a commit came for migration %d, which is not known here", migration_id)
            self._report(failed_status(migration_id, "this rank does not know it"))
            return
        self._c.wake()

    def _hear_abort(self, abort: mesh_pb2.MigrationAbort) -> None:
        migration = self._book.drop(abort.id, "aborted")
        if migration is None:
            log.info("migration %d, aborted (%s), is not under way here", abort.id, abort.reason)
            self._say_again(abort.id)
            return
        log.info("migration %d of layer %d aborted: %s", abort.id, migration.layer, abort.reason)
        self._dropped(migration)

    def _dropped(self, migration: Migration) -> None:
        """Have the worker finish it, also when it is in the middle of its transfers."""
        self._work.put(migration)
        if self._c.side is not None:
            self._c.side.wake()

    def _say_again(self, migration_id: int) -> None:
        status = self._book.status(migration_id)
        if status is not None:
            self._report(status)

    # -- step thread --------------------------------------------------------------------------------------------

    def listed(self) -> Sequence[int]:
        """The migrations that this rank is ready to switch to before the next step."""
        return self._book.listed()

    def switch(self, ids: Sequence[int], step: int) -> list[str]:
        """Before step ``step``: all ranks of the view switch to these. Returns their traceparents."""
        migrations = self._book.switch(ids, step)
        for migration in migrations:
            started_s = time.perf_counter()
            if self._c.experts is not None:
                self._c.experts.commit(migration.layer, migration.changes)
            if self._c.routing is not None:
                assert migration.routing is not None, "a rank that routes stages a table"
                self._c.routing.put(migration.layer, migration.routing)
            migration.switch_seconds = time.perf_counter() - started_s
            migration.switched_ns = time.time_ns()
            self._report(committed_status(migration, step))
            self._work.put(migration)
        return [migration.plan.traceparent for migration in migrations]

    # -- worker -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        preempt_nobody()
        with torch.inference_mode():
            while True:
                try:
                    migration = self._work.get(timeout=_FORGOTTEN_CHECK_S)
                except queue.Empty:
                    for forgotten in self._book.drop_forgotten():
                        log.warning("migration %d: nothing was heard of it any more", forgotten.id)
                        self._finish(forgotten)
                    continue
                if migration is None:
                    break
                if migration.outcome:
                    self._finish(migration)
                else:
                    self._stage(migration)
        if self._c.side is not None:
            self._c.side.close()

    def _stage(self, migration: Migration) -> None:
        try:
            with beside_steps(self._c.device):
                self._prepare(migration)
        except _CalledOffError:
            return  # whoever called it off has it finished
        except Exception as error:  # whatever it is, it voids this plan and nothing else
            log.warning("migration %d of layer %d failed", migration.id, migration.layer, exc_info=True)
            self._fail(migration, f"{type(error).__name__}: {error}")
            return
        seconds = time.monotonic() - migration.received_s
        if seconds > migration.plan.timeout_s:
            self._fail(migration, f"staged after {seconds:.1f} s, too late")
            return
        status = mesh_pb2.MigrationStatus(
            id=migration.id,
            phase=mesh_pb2.MIGRATION_PHASE_STAGED,
            bytes=sum(part.nbytes for weights in migration.staged for part in weights),
            seconds=seconds,
            from_checkpoint=migration.num_fallbacks,
        )
        migration.staged_ns = time.time_ns()
        if not self._book.staged(migration, status):
            return
        exemplar = migration.plan.traceparent if is_sampled(migration.plan.traceparent) else ""
        self._metrics.rank_migration_duration_seconds.observe(seconds, exemplar, phase="stage")
        self._report(status)

    def _prepare(self, migration: Migration) -> None:
        if self._c.routing is not None:
            migration.routing = self._c.routing.prepare(migration.plan.placement)
        if self._c.experts is not None:
            self._load(self._c.experts, migration)

    def _load(self, experts: ExpertHalf, migration: Migration) -> None:
        """Fill staging memory with what comes to this rank's slots, and send peers what they take from it."""
        plan, own, width = migration.plan, self._c.view.expert_index, self._c.view.slots_per_rank
        assert own is not None, "a rank with experts has slots"
        arriving = [i for i, transfer in enumerate(plan.transfers) if transfer.slot // width == own]
        migration.staged = experts.reserve(len(arriving))
        memory = dict(zip(arriving, migration.staged, strict=True))
        came_from: dict[int, str] = {}
        takes, gives = [], []
        for number, transfer in enumerate(plan.transfers):
            source, slot = divmod(transfer.source_slot, width) if transfer.HasField("source_slot") else (None, 0)
            if number in memory and source == own:
                for part, held in zip(memory[number], experts.read(migration.layer, slot), strict=True):
                    part.copy_(held)
                came_from[number] = LOCAL
            elif number in memory and source is not None:
                takes.append(Take(number, source, memory[number]))
                came_from[number] = PEER
            elif source == own:
                gives.append(Give(number, transfer.slot // width, experts.read(migration.layer, slot)))
        if takes or gives:
            for number in self._exchange(migration, takes, gives):
                del came_from[number]
        for number in arriving:
            if number not in came_from:
                self._check_time(migration)
                experts.fetch(migration.layer, plan.transfers[number].expert, memory[number])
        migration.came_from = [came_from.get(number, CHECKPOINT) for number in arriving]
        changes = [SlotChange(plan.transfers[i].slot % width, plan.transfers[i].expert, memory[i]) for i in arriving]
        migration.changes = sorted([*changes, *self._emptied(migration)], key=lambda change: change.slot)

    def _exchange(self, migration: Migration, takes: Sequence[Take], gives: Sequence[Give]) -> list[int]:
        """Take part in the transfers between ranks. Returns the numbers of those that did not come: the checkpoint
        has to stand in, for which time is left."""
        side, plan = self._c.side, migration.plan
        assert side is not None, "two expert ranks have a side group"
        patience = Patience(migration.called_off, migration.deadline_s)
        side.begin(plan.id, takes, gives, patience)
        try:
            failed = side.take(patience.half())
            not_given = side.give(patience.half())
        finally:
            side.end()
        self._check_time(migration)
        for number, error in failed.items():
            migration.num_fallbacks += 1
            self._metrics.migration_fallbacks.add(cause=error.cause)
            log.warning(
                "migration %d: expert %d of layer %d comes from the checkpoint: %s",
                *(migration.id, plan.transfers[number].expert, migration.layer, error),
            )
        for number in not_given:
            log.warning("migration %d: nobody took expert %d", migration.id, plan.transfers[number].expert)
        return list(failed)

    @staticmethod
    def _check_time(migration: Migration) -> None:
        if migration.outcome:
            raise _CalledOffError
        if time.monotonic() > migration.deadline_s:
            raise TimeoutError("not all transfers were done in time")

    def _emptied(self, migration: Migration) -> list[SlotChange]:
        old = next(layer.slots for layer in self.view.proto.placement if layer.layer == migration.layer)
        own, width = self._c.view.expert_index, self._c.view.slots_per_rank
        assert own is not None, "a rank with experts has slots"
        first = own * width
        new = migration.plan.placement.slots
        return [SlotChange(slot, -1, None) for slot in range(width) if new[first + slot] == -1 != old[first + slot]]

    def _fail(self, migration: Migration, reason: str) -> None:
        if self._book.drop(migration.id, "failed") is not None:
            self._report(failed_status(migration.id, reason))
            self._finish(migration)

    def _finish(self, migration: Migration) -> None:
        """It is over, one way or the other. Its changes stay: an abort may cross the switch."""
        if migration.finished_as == migration.outcome:
            return
        migration.finished_as = migration.outcome
        staged, migration.staged = migration.staged, ()
        if staged and self._c.experts is not None:
            self._c.experts.release(staged)
        metrics = self._metrics
        metrics.rank_migrations.add(outcome=migration.outcome)
        if migration.outcome == "committed":
            metrics.rank_migration_duration_seconds.observe(migration.switch_seconds, phase="switch")
            metrics.migrated_bytes.add(sum(part.nbytes for weights in staged for part in weights))
            for source in migration.came_from:
                metrics.migrated_slots.add(source=source)
        if self._c.telemetry.tracing:
            self._record_spans(migration)

    def _record_spans(self, migration: Migration) -> None:
        """What this rank did, as a part of the migration's trace, which the balancer began."""
        tracer, traceparent = self._c.telemetry.tracer, migration.plan.traceparent
        if not is_sampled(traceparent):
            return
        span = record_span(
            tracer,
            "rank migration",
            context_from_traceparent(traceparent),
            migration.received_ns,
            migration.switched_ns or time.time_ns(),
            {
                "expertmesh.migration": migration.id,
                "expertmesh.layer": migration.layer,
                "expertmesh.placement.version": migration.plan.placement.version,
                "expertmesh.rank": self._c.view.rank,
                "expertmesh.migration.slots": len(migration.came_from),
                "expertmesh.migration.sources": migration.came_from,
                "expertmesh.migration.outcome": migration.outcome,
            },
        )
        parent = trace.set_span_in_context(span)
        if migration.staged_ns:
            record_span(tracer, "stage", parent, migration.received_ns, migration.staged_ns)
        if migration.switched_ns:
            began_ns = migration.switched_ns - int(migration.switch_seconds * 1e9)
            record_span(tracer, "switch", parent, began_ns, migration.switched_ns)

    def _report(self, status: mesh_pb2.MigrationStatus) -> None:
        self._c.report(mesh_pb2.JoinRequest(migration=status))


def failed_status(migration_id: int, reason: str) -> mesh_pb2.MigrationStatus:
    return mesh_pb2.MigrationStatus(id=migration_id, phase=mesh_pb2.MIGRATION_PHASE_FAILED, reason=reason)
