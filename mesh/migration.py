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
from collections.abc import Sequence

import torch

from expertmesh.mesh.background import preempt_nobody
from expertmesh.mesh.device import beside_steps
from expertmesh.mesh.migration_book import Migration, MigrationBook, PlanRefusedError, committed_status
from expertmesh.mesh.migration_spans import record_migration
from expertmesh.mesh.migration_staging import CalledOffError, Stager
from expertmesh.mesh.migration_staging import MigrationContext as MigrationContext
from expertmesh.mesh.telemetry import is_sampled
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

_FORGOTTEN_CHECK_S = 1.0


class Migrations:
    """The migrations of one view on one rank; ``start`` it once, ``call_off`` when the view is over."""

    LONGEST_JOIN_S = 2.0
    """How long ``close`` may take."""

    def __init__(self, context: MigrationContext) -> None:
        self._c = context
        self._metrics = context.telemetry.metrics
        self._book = MigrationBook(context.view, context.num_experts)
        self._stager = Stager(context, lambda: self.view)
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
                self._stager.prepare(migration)
        except CalledOffError:
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
            record_migration(self._c.telemetry.tracer, self._c.view.rank, migration)

    def _report(self, status: mesh_pb2.MigrationStatus) -> None:
        self._c.report(mesh_pb2.JoinRequest(migration=status))


def failed_status(migration_id: int, reason: str) -> mesh_pb2.MigrationStatus:
    return mesh_pb2.MigrationStatus(id=migration_id, phase=mesh_pb2.MIGRATION_PHASE_FAILED, reason=reason)
