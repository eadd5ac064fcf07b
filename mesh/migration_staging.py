"""What a plan asks of one rank before its layer can switch: a routing table, and weights in staging memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from expertmesh.mesh.device import CPU, begin_behind_steps
from expertmesh.mesh.halves import ExpertHalf, ExpertWeights, SlotChange
from expertmesh.mesh.migration_book import Migration
from expertmesh.mesh.placement import RoutingTables
from expertmesh.mesh.side_transfers import Give, Patience, Take
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

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


class CalledOffError(Exception):
    """Whoever called it off knows why."""


class Stager:
    """Stages one migration after the other, on a thread beside the step loop.

    Args:
        view: as it runs now.
    """

    def __init__(self, context: MigrationContext, view: Callable[[], ViewInfo]) -> None:
        self._c = context
        self._view = view

    def prepare(self, migration: Migration) -> None:
        """Put its routing table and its weights where its switch finds them, and give peers what they take from here.

        Raises:
            CalledOffError: it was given up meanwhile.
            TimeoutError: the transfers took longer than the plan allows.
        """
        if self._c.routing is not None:
            migration.routing = self._c.routing.prepare(migration.plan.placement)
        if self._c.experts is not None:
            self._load(self._c.experts, migration)

    def _load(self, experts: ExpertHalf, migration: Migration) -> None:
        """Fill staging memory with what comes to this rank's slots, and send peers what they take from it."""
        plan, own, width = migration.plan, self._c.view.expert_index, self._c.view.slots_per_rank
        assert own is not None, "a rank with experts has slots"
        arriving = [i for i, transfer in enumerate(plan.transfers) if transfer.slot // width == own]
        migration.staged = self._reserve(experts, len(arriving))
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
                if not any(memory[number] is weights for weights in migration.staged):
                    (memory[number],) = self._reserve(experts, 1)
                    migration.staged = [*migration.staged, memory[number]]
                experts.fetch(migration.layer, plan.transfers[number].expert, memory[number])
        migration.came_from = [came_from.get(number, CHECKPOINT) for number in arriving]
        changes = [SlotChange(plan.transfers[i].slot % width, plan.transfers[i].expert, memory[i]) for i in arriving]
        migration.changes = sorted([*changes, *self._emptied(migration)], key=lambda change: change.slot)

    def _reserve(self, experts: ExpertHalf, num_experts: int) -> list[ExpertWeights]:
        staged = experts.reserve(num_experts)
        begin_behind_steps(self._c.device)
        return staged

    def _exchange(self, migration: Migration, takes: Sequence[Take], gives: Sequence[Give]) -> list[int]:
        """Take part in the transfers between ranks. Returns the numbers of those that did not come: the checkpoint
        has to stand in, for which time is left."""
        side, plan = self._c.side, migration.plan
        assert side is not None, "two expert ranks have a side group"
        metrics = self._c.telemetry.metrics
        patience = Patience(migration.called_off, migration.deadline_s)
        side.begin(plan.id, takes, gives, patience)
        try:
            failed = side.take(patience.half())
            not_given = side.give(patience.half())
        finally:
            side.end()
            self._leave_to_late_reads(migration, side)
        self._check_time(migration)
        for came in side.came.values():
            metrics.migration_peer_bytes.add(came.num_bytes, transport=came.transport)
            metrics.migration_peer_seconds.add(came.seconds, transport=came.transport)
        for number, error in failed.items():
            migration.num_fallbacks += 1
            metrics.migration_fallbacks.add(cause=error.cause)
            log.warning(
                "migration %d: expert %d of layer %d comes from the checkpoint: %s",
                *(migration.id, plan.transfers[number].expert, migration.layer, error),
            )
        for number in not_given:
            log.warning("migration %d: nobody took expert %d", migration.id, plan.transfers[number].expert)
        return list(failed)

    def _leave_to_late_reads(self, migration: Migration, side: SideGroup) -> None:
        """Memory that may yet be written to goes back when it no longer is, and not with the migration."""
        experts = self._c.experts
        assert experts is not None, "it takes experts"
        for read in side.leaving.values():
            late = read.take.into
            migration.staged = [weights for weights in migration.staged if weights is not late]
            read.reading.over.add_done_callback(partial(_release, experts, late))

    @staticmethod
    def _check_time(migration: Migration) -> None:
        if migration.outcome:
            raise CalledOffError
        if time.monotonic() > migration.deadline_s:
            raise TimeoutError("not all transfers were done in time")

    def _emptied(self, migration: Migration) -> list[SlotChange]:
        old = next(layer.slots for layer in self._view().proto.placement if layer.layer == migration.layer)
        own, width = self._c.view.expert_index, self._c.view.slots_per_rank
        assert own is not None, "a rank with experts has slots"
        first = own * width
        new = migration.plan.placement.slots
        return [SlotChange(slot, -1, None) for slot in range(width) if new[first + slot] == -1 != old[first + slot]]


def _release(experts: ExpertHalf, weights: ExpertWeights, _: Future[None]) -> None:
    experts.release([weights])
