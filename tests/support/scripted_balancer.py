"""A balancer that a test plays: views of whoever is there, migrations on command. It speaks the real contracts."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import grpc

from expertmesh.balancer.store import RendezvousStore
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.rpc import RpcServer
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.mesh.view import HOSTS_EXPERTS, ViewInfo
from expertmesh.v1 import mesh_pb2, mesh_pb2_grpc

WAIT_S = 20.0
Place = Callable[[int, int, int], Sequence[int]]
"""(num_experts, num_ranks, slots_per_rank) → global slot → expert."""


def linear(num_experts: int, num_ranks: int, slots_per_rank: int) -> list[int]:
    """Experts in order over the ranks, as evenly as they go; the last slots of a rank stay empty."""
    slots = []
    for rank in range(num_ranks):
        own = [*range(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)]
        assert len(own) <= slots_per_rank, "the ranks have too few slots"
        slots += own + [-1] * (slots_per_rank - len(own))
    return slots


class ViewChangedError(Exception):
    """The view of a migration is over."""


@dataclass(eq=False)
class _Member:
    registration: mesh_pb2.Registration
    outbox: asyncio.Queue[mesh_pb2.JoinResponse | None] = field(default_factory=asyncio.Queue)  # None ends the stream
    ready_view: int = 0
    is_hung_up: bool = False


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """How one migration went: the time from the commit to the last answer, and what the ranks reported."""

    step: int
    commit_s: float
    staged: list[mesh_pb2.MigrationStatus]
    committed: list[mesh_pb2.MigrationStatus]


class ScriptedBalancer(mesh_pb2_grpc.MembershipServiceServicer):
    """Forms the first view of ``num_ranks`` ranks and then one of the survivors whenever a rank's stream breaks."""

    def __init__(self, num_ranks: int, place: Place = linear) -> None:
        self._num_ranks = num_ranks
        self._place = place
        self._members: dict[str, _Member] = {}
        self._changed = asyncio.Condition()
        self._store = RendezvousStore("127.0.0.1")
        self._server: RpcServer | None = None
        self._numbers = itertools.count(1)
        self._ids = itertools.count(1)
        self.view = mesh_pb2.View()
        self.statuses: dict[int, dict[str, mesh_pb2.MigrationStatus]] = {}
        self.broken: list[mesh_pb2.ViewBroken] = []
        self.stats: list[tuple[str, mesh_pb2.StatsReport]] = []

    @property
    def address(self) -> str:
        assert self._server is not None
        return self._server.address

    async def start(self) -> None:
        await self._store.open()

        def register(server: grpc.aio.Server) -> Sequence[str]:
            mesh_pb2_grpc.add_MembershipServiceServicer_to_server(self, server)
            return (mesh_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,)

        self._server = await rpc.start_server(
            host="127.0.0.1", port=0, tls=MeshConfig().tls, register=register, telemetry=disabled_telemetry()
        )

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0.1)
        self._store.close()

    # -- membership ---------------------------------------------------------------------------------------------

    async def Join(
        self, request_iterator: AsyncIterator[mesh_pb2.JoinRequest], context: object
    ) -> AsyncIterator[mesh_pb2.JoinResponse]:
        registration = (await anext(request_iterator)).registration
        member = _Member(registration, ready_view=registration.view_number)
        server_id = registration.server_id
        member.outbox.put_nowait(
            mesh_pb2.JoinResponse(welcome=mesh_pb2.Welcome(mesh_id="test", heartbeat_s=1.0, lease_s=10.0))
        )
        reading = asyncio.create_task(self._read(member, request_iterator), name=f"read {server_id}")
        try:
            self._members[server_id] = member
            await self._form()
            while (message := await member.outbox.get()) is not None:
                yield message
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if self._members.get(server_id) is member and not member.is_hung_up:
                del self._members[server_id]
                if any(rank.server_id == server_id for rank in self.view.ranks):
                    await self._form()

    async def _read(self, member: _Member, requests: AsyncIterator[mesh_pb2.JoinRequest]) -> None:
        async for request in requests:
            async with self._changed:
                kind = request.WhichOneof("message")
                if kind == "view_ready":
                    member.ready_view = request.view_ready.view_number
                elif kind == "stats":
                    self.stats.append((member.registration.server_id, request.stats))
                elif kind == "view_broken":
                    self.broken.append(request.view_broken)
                elif kind == "migration":
                    of_plan = self.statuses.setdefault(request.migration.id, {})
                    of_plan[member.registration.server_id] = request.migration
                self._changed.notify_all()

    async def _form(self) -> None:
        ranks = [member for member in self._members.values() if member.registration.role != mesh_pb2.ROLE_ROUTER]
        if not self.view.number and len(ranks) < self._num_ranks:
            return
        if not any(member.registration.role in HOSTS_EXPERTS for member in ranks):
            return  # the mesh stops
        known = {(rank.server_id, rank.incarnation) for rank in self.view.ranks}
        if known != {(m.registration.server_id, m.registration.incarnation) for m in ranks}:
            self.view = self._next_view([member.registration for member in ranks])
        for member in self._members.values():
            if member.ready_view != self.view.number:
                view = mesh_pb2.View()
                view.CopyFrom(self.view)
                if member.registration.role == mesh_pb2.ROLE_ROUTER:
                    view.ClearField("secret")
                    member.ready_view = view.number
                member.outbox.put_nowait(mesh_pb2.JoinResponse(view=view))
        async with self._changed:
            self._changed.notify_all()

    def _next_view(self, registrations: list[mesh_pb2.Registration]) -> mesh_pb2.View:
        registrations.sort(key=lambda r: (r.role == mesh_pb2.ROLE_EXPERT, r.server_id))
        experts = [r for r in registrations if r.role in HOSTS_EXPERTS]
        width = max(r.num_slots for r in experts)
        view = mesh_pb2.View(
            number=next(self._numbers), slots_per_rank=width, store_address=self._store.address, secret=os.urandom(16)
        )
        for number, r in enumerate(registrations):
            view.ranks.add(
                rank=number,
                server_id=r.server_id,
                incarnation=r.incarnation,
                role=r.role,
                node=r.node,
                grpc_address=r.grpc_address,
                rank_address=r.rank_address,
                num_slots=r.num_slots,
            )
        model = experts[0].model
        versions = {placement.layer: placement.version for placement in self.view.placement}
        slots = self._place(model.num_experts, len(experts), width)
        for layer in model.moe_layers:
            view.placement.add(layer=layer, version=versions.get(layer, 0) + 1, slots=slots)
        return view

    async def wait_serving(self, number: int = 1) -> None:
        """Until a view of at least this number serves."""
        await self._wait(lambda: self.view.number >= number and self._serves(), f"view {number}")

    def _serves(self) -> bool:
        return all(
            (member := self._members.get(rank.server_id)) is not None and member.ready_view == self.view.number
            for rank in self.view.ranks
        )

    async def _wait(self, condition: Callable[[], bool], what: str) -> None:
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(condition), WAIT_S)
            except TimeoutError:
                raise AssertionError(f"waited {WAIT_S:g} s for {what}") from None

    async def reconnected(self, server_id: str) -> mesh_pb2.Registration:
        """End a rank's stream; returns what it registers with on the next one."""
        member = self._members[server_id]
        member.is_hung_up = True
        member.outbox.put_nowait(None)
        await self._wait(lambda: self._members[server_id] is not member, f"{server_id} to come back")
        return self._members[server_id].registration

    # -- migrations ---------------------------------------------------------------------------------------------

    def placement(self, layer: int) -> list[int]:
        return next(list(placement.slots) for placement in self.view.placement if placement.layer == layer)

    def make_plan(self, layer: int, slots: Sequence[int], *, timeout_s: float = 10.0) -> mesh_pb2.MigrationPlan:
        # The helper's plans are for the view as it runs: commits are put into it below.
        from support.migration import make_plan

        return make_plan(next(self._ids), ViewInfo(self.view, 0), layer, slots, timeout_s=timeout_s)

    def announce(self, plan: mesh_pb2.MigrationPlan) -> None:
        self._tell(mesh_pb2.JoinResponse(plan=plan))

    def _tell(self, message: mesh_pb2.JoinResponse) -> None:
        for rank in self.view.ranks:
            if rank.server_id in self._members:
                self._members[rank.server_id].outbox.put_nowait(message)

    async def until(self, plan: mesh_pb2.MigrationPlan, phase: mesh_pb2.MigrationPhase.ValueType) -> None:
        """Until every rank has reported the phase.

        Raises:
            ViewChangedError: the view is another one.
            AssertionError: a rank reported a failure.
        """

        def heard() -> dict[str, mesh_pb2.MigrationStatus]:
            return self.statuses.get(plan.id, {})

        def failed() -> list[mesh_pb2.MigrationStatus]:
            return [status for status in heard().values() if status.phase == mesh_pb2.MIGRATION_PHASE_FAILED]

        def over() -> bool:
            return self.view.number != plan.view_number

        def done() -> bool:
            names = [rank.server_id for rank in self.view.ranks]
            return all(name in heard() and heard()[name].phase == phase for name in names)

        await self._wait(lambda: over() or bool(failed()) or done(), f"plan {plan.id} to reach phase {phase}")
        if over():
            raise ViewChangedError
        assert not failed(), failed()

    async def migrate(self, layer: int, slots: Sequence[int]) -> Migrated:
        """One migration from the plan to the switch of every rank."""
        plan = self.make_plan(layer, slots)
        self.announce(plan)
        await self.until(plan, mesh_pb2.MIGRATION_PHASE_STAGED)
        staged = list(self.statuses[plan.id].values())
        started_s = time.monotonic()
        await self.commit(plan)
        committed = list(self.statuses[plan.id].values())
        steps = {status.step for status in committed}
        assert len(steps) == 1, f"ranks switched at different steps: {steps}"
        return Migrated(step=steps.pop(), commit_s=time.monotonic() - started_s, staged=staged, committed=committed)

    async def commit(self, plan: mesh_pb2.MigrationPlan) -> None:
        self._tell(mesh_pb2.JoinResponse(commit=mesh_pb2.MigrationCommit(id=plan.id)))
        await self.until(plan, mesh_pb2.MIGRATION_PHASE_COMMITTED)
        running = next(p for p in self.view.placement if p.layer == plan.placement.layer)
        running.CopyFrom(plan.placement)

    def slot_loads(self, layer: int, version: int) -> dict[str, list[int]]:
        """Server id → rows that its attention half sent to each global slot under this placement."""
        found: dict[str, list[int]] = {}
        for server_id, report in self.stats:
            for part in report.layers:
                if (part.layer, part.version, report.view_number) == (layer, version, self.view.number):
                    before = found.get(server_id, [0] * len(part.slot_load))
                    found[server_id] = [a + b for a, b in zip(before, part.slot_load, strict=True)]
        return found

    async def until_sent(self, layer: int, version: int, num_rows: int) -> dict[str, list[int]]:
        """``slot_loads`` when every attention half has reported so many rows."""
        halves = sum(rank.role != mesh_pb2.ROLE_EXPERT for rank in self.view.ranks)

        def loads() -> dict[str, list[int]]:
            return self.slot_loads(layer, version)

        def done() -> bool:
            return len(loads()) == halves and min(map(sum, loads().values())) >= num_rows

        await self._wait(done, f"{num_rows} rows of layer {layer}")
        return loads()

    def abort(self, plan: mesh_pb2.MigrationPlan) -> None:
        self._tell(mesh_pb2.JoinResponse(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="for the test")))
