"""Ranks with real slots and a real side group, whose lockstep the test plays."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from opentelemetry.trace import NoOpTracer

from expertmesh.expert_server.slots import Slots
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.migration import MigrationContext, Migrations
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.mesh.view import ViewInfo
from expertmesh.mesh.weight_reads import SlotMemory, WeightReads
from expertmesh.v1 import mesh_pb2
from support.groups import side_links
from support.migration import make_plan, make_view

NUM_SLOTS = 6
LAYERS = (1, 2)
# Ranks 1 and 2 have slots: experts 0..3 and 4..7, two empty slots each.
OLD = [0, 1, 2, 3, -1, -1, 4, 5, 6, 7, -1, -1]
# A swap between the ranks, one inside rank 1, a replica from rank 1 on rank 2, and one slot emptied.
NEW = [4, 2, 1, 3, 0, -1, 0, 5, 6, 7, 3, -1]
EMPTIED = [4, 2, 1, -1, 0, -1, 0, 5, 6, 7, 3, -1]

STAGED, COMMITTED, FAILED = (
    mesh_pb2.MIGRATION_PHASE_STAGED,
    mesh_pb2.MIGRATION_PHASE_COMMITTED,
    mesh_pb2.MIGRATION_PHASE_FAILED,
)


class FakeCheckpoint(Checkpoint):
    """Counts the experts that were read; ``hold`` keeps the readers until it is set, ``error`` is raised."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reads: list[tuple[int, int]] = []
        self.asked = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.error: Exception | None = None

    def copy_expert(self, spec: ModelSpec, layer: int, expert: int, *parts: torch.Tensor) -> None:
        self.asked.set()
        assert self.hold.wait(10)
        if self.error is not None:
            raise self.error
        self.reads.append((layer, expert))
        super().copy_expert(spec, layer, expert, *parts)


class Rank:
    """One rank's migrations; ``statuses`` is what it has reported."""

    def __init__(
        self,
        path: Path,
        view: ViewInfo,
        links: dict[int, socket.socket],
        placement: dict[int, list[int]],
        transport: str = "tcp",
    ) -> None:
        spec = load_spec(ModelConfig(path=path))
        self.spec = spec
        self.checkpoint = FakeCheckpoint(path)
        self.metrics = Metrics(role="both")
        telemetry = Telemetry(NoOpTracer(), self.metrics)
        self.slots: Slots | None = None
        self.side: SideGroup | None = None
        self.reads: WeightReads | None = None
        if view.expert_index is not None:
            self.slots = Slots(spec, self.checkpoint, NUM_SLOTS, self.metrics.slots_loaded, layers_at_a_time=2)
            first = view.expert_index * NUM_SLOTS
            self.slots.load({layer: slots[first : first + NUM_SLOTS] for layer, slots in placement.items()})
            self.checkpoint.reads.clear()
            if transport == "nixl":
                self.reads = WeightReads(SlotMemory(self.slots.memory()), "127.0.0.1")
            self.side = SideGroup(links, bytes_per_s=1e9, reads=self.reads)
        self.routing = RoutingTables(view.proto.placement, spec.num_experts, Topology.of(view))
        self.statuses: list[mesh_pb2.MigrationStatus] = []
        self.changed = threading.Condition()
        self.migrations = Migrations(
            MigrationContext(
                view=view,
                num_experts=spec.num_experts,
                experts=self.slots,
                routing=self.routing if view.expert_index is None else None,
                side=self.side,
                report=self.report,
                wake=lambda: None,
                telemetry=telemetry,
            )
        )

    def report(self, message: mesh_pb2.JoinRequest) -> None:
        with self.changed:
            self.statuses.append(message.migration)
            self.changed.notify_all()

    def await_status(self, plan_id: int) -> mesh_pb2.MigrationStatus:
        """The newest status of a plan, as soon as there is one."""

        def newest() -> mesh_pb2.MigrationStatus | None:
            return next((status for status in reversed(self.statuses) if status.id == plan_id), None)

        with self.changed:
            assert self.changed.wait_for(lambda: newest() is not None, 10), "nothing was reported"
            found = newest()
        assert found is not None
        return found

    def hear(self, **message: mesh_pb2.MigrationPlan | mesh_pb2.MigrationCommit | mesh_pb2.MigrationAbort) -> None:
        self.migrations.hear(mesh_pb2.JoinResponse(**message))  # type: ignore[arg-type]  # one of its fields

    def close(self) -> None:
        self.checkpoint.hold.set()
        self.migrations.close()
        if self.reads is not None:
            self.reads.close()
        if self.slots is not None:
            assert self.slots.staging.used == 0
        assert not self.migrations._thread.is_alive()


class Ranks:
    """An attention rank and two expert ranks in one view."""

    def __init__(self, path: Path, transport: str = "tcp") -> None:
        self.path, self.transport = path, transport
        links = [{}, *side_links(2)]
        placement = dict.fromkeys(LAYERS, OLD)
        view = make_view("aee", placement, num_slots=NUM_SLOTS)
        self.ranks = [
            Rank(path, ViewInfo(view.proto, rank), own, placement, transport) for rank, own in enumerate(links)
        ]
        self.ids = itertools.count(1)
        self.step = 0

    def start(self) -> None:
        for rank in self.ranks:
            rank.migrations.start()

    @property
    def view(self) -> ViewInfo:
        return self.ranks[0].migrations.view

    def plan(self, layer: int, slots: Sequence[int], **options: bool | float) -> mesh_pb2.MigrationPlan:
        return make_plan(next(self.ids), self.view, layer, slots, **options)  # type: ignore[arg-type]  # its options

    def announce(self, plan: mesh_pb2.MigrationPlan) -> list[mesh_pb2.MigrationStatus]:
        """Returns the status of each rank."""
        for rank in self.ranks:
            rank.hear(plan=plan)
        return [rank.await_status(plan.id) for rank in self.ranks]

    def commit(self, *plans: mesh_pb2.MigrationPlan) -> None:
        for rank in self.ranks:
            for plan in plans:
                rank.hear(commit=mesh_pb2.MigrationCommit(id=plan.id))
        self.agree()

    def agree(self) -> None:
        """The lockstep and the switch before one step."""
        agreed = sorted(set.intersection(*(set(rank.migrations.listed()) for rank in self.ranks)))
        self.step += 1
        for rank in self.ranks:
            rank.migrations.switch(agreed, self.step)

    def migrate(self, layer: int, slots: Sequence[int], **options: bool | float) -> list[mesh_pb2.MigrationStatus]:
        plan = self.plan(layer, slots, **options)
        statuses = self.announce(plan)
        assert [status.phase for status in statuses] == [STAGED] * 3, statuses
        self.commit(plan)
        self.assert_runs(layer, slots)
        return statuses

    def assert_runs(self, layer: int, slots: Sequence[int]) -> None:
        """Every rank says so, and every slot computes with its expert's weights."""
        checkpoint = Checkpoint(self.path)
        for rank in self.ranks:
            running = next(p for p in rank.migrations.view.proto.placement if p.layer == layer)
            assert list(running.slots) == list(slots)
            if rank.slots is None:
                continue
            index = rank.migrations.view.expert_index
            assert index is not None
            own = list(slots[index * NUM_SLOTS : (index + 1) * NUM_SLOTS])
            assert list(rank.slots.slots(layer)) == own
            for slot, expert in enumerate(own):
                parts = rank.slots.read(layer, slot)
                if expert == -1:
                    assert all(part.isnan().all() for part in parts)
                else:
                    wanted = checkpoint.expert(rank.spec, layer, expert)
                    assert all(torch.equal(part, want) for part, want in zip(parts, wanted, strict=True))

    def reads(self) -> list[tuple[int, int]]:
        return sorted(itertools.chain.from_iterable(rank.checkpoint.reads for rank in self.ranks))

    def close(self) -> None:
        threads = [threading.Thread(target=rank.close) for rank in self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
