"""A balancer without processes: a clock that jumps, effects that are recorded, servers that are a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.control import PlacementControl
from expertmesh.balancer.door import Verdict
from expertmesh.balancer.draining import Draining
from expertmesh.balancer.evaluation import answer
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.placement_file import PlacementFile
from expertmesh.balancer.reconcile import Reconciler
from expertmesh.balancer.replicas import ReplicaRule
from expertmesh.balancer.scaling import Autoscaler
from expertmesh.balancer.scaling_policy import load_policy
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.balancer.state import DurableState
from expertmesh.mesh.config import MeshConfig
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import FakeServer, RecordedEffects, registration
from support.placement_policy import FixedStatistics, SwapPolicy

STEP_S = 0.02


class World:
    """``advance`` moves the clock in small steps; connected servers heartbeat, get ready for their views, stage what
    they are told and switch together, as ranks do."""

    def __init__(
        self, config: MeshConfig, state: DurableState | None = None, initial: PlacementFile | None = None
    ) -> None:
        self.config = config
        self.initial = initial
        self.statistics = FixedStatistics()
        self.policy = SwapPolicy()
        self.solver_hangs = False
        self.step = 0
        self.now = 100.0
        self.servers: dict[str, FakeServer] = {}
        self.next_session = 1
        self.effects = RecordedEffects()
        self.start_balancer(
            state or DurableState(mesh_id="m", view=mesh_pb2.View(), fingerprint="", fenced=(), events=())
        )

    def start_balancer(self, state: DurableState) -> None:
        self.events = EventLog(lambda: self.now, state.events)
        self.actual = Actual(self.config.balancer, effects=self.effects, events=self.events, state=state)
        self.effects.jobs.clear()
        self.control = PlacementControl.create(
            self.config.balancer,
            self.actual,
            statistics=self.statistics,
            effects=self.effects,
            events=self.events,
            rule=ReplicaRule.of(self.config.expert),
        )
        self.targets = ScaleTargets(self.config, self.actual, self.effects, self.events)
        self.draining = Draining(self.actual, self.effects, self.events, self.targets)
        policy = load_policy(self.config.scaling.hook)
        autoscaler = Autoscaler(self.config, self.actual, self.targets, self.draining, self.events, policy)
        self.reconciler = Reconciler(
            self.config,
            self.actual,
            control=self.control,
            effects=self.effects,
            events=self.events,
            targets=self.targets,
            autoscaler=autoscaler,
            store_address="127.0.0.1:9",
            initial=self.initial,
        )
        self.last_beat_s = self.now
        self.settle()

    def restart_balancer(self, down_s: float = 1.0, state: DurableState | None = None) -> None:
        """kill -9, and a new one that has what was saved last."""
        for server in self.servers.values():
            server.connected = False
        self.now += down_s
        self.start_balancer(state or self.effects.saved[-1])

    def settle(self) -> None:
        for _ in range(1000):
            if self.reconciler.tick(self.now) is None:
                return
        raise AssertionError("the loop does not come to rest")

    def advance(self, seconds: float, step_s: float = STEP_S) -> None:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = min(end, self.now + step_s)
            if self.now - self.last_beat_s >= self.config.balancer.heartbeat_s:
                self.last_beat_s = self.now
                for server in self.servers.values():
                    if server.connected and not server.hung:
                        self.say(server, heartbeat=mesh_pb2.Heartbeat(load=server.load))
            self.settle()
            self.get_ready()
            self.solve()
            self.migrate()

    def solve(self) -> None:
        """The worker answers."""
        while self.effects.jobs and not self.solver_hangs:
            self.control.online.answered(answer(self.policy, self.effects.jobs.pop(0)), self.now)
            self.settle()

    def migrate(self) -> None:
        """Ranks read what they were sent, then make a step: they switch to what all have heard the commit of."""
        ranks = self.read()
        self.step += 1
        agreed = set.intersection(*(server.commits for server in ranks)) if ranks else set()
        for plan_id in sorted(agreed):
            for server in ranks:
                self._switch(server, plan_id)
        self.settle()

    def read(self) -> list[FakeServer]:
        """The view's ranks read what they were sent."""
        ranks = [s for s in self.servers.values() if s.ready and s.running.number == self.view.number]
        for server in ranks:
            self._read(server)
        return ranks

    def _read(self, server: FakeServer) -> None:
        messages = self.effects.sent[server.session]
        if not server.connected:
            return
        for status in server.unsent:
            self.say(server, migration=status)
        server.unsent.clear()
        while server.num_heard < len(messages):
            message = messages[server.num_heard]
            kind = message.WhichOneof("message")
            if kind == "plan" and server.slow:
                return
            server.num_heard += 1
            if kind == "plan" and message.plan.view_number == server.running.number:
                self._stage(server, message.plan)
            elif kind == "commit" and message.commit.id in server.staged and not server.deaf:
                server.commits.add(message.commit.id)
            elif kind == "abort":
                server.staged.pop(message.abort.id, None)
                server.commits.discard(message.abort.id)

    def _stage(self, server: FakeServer, plan: mesh_pb2.MigrationPlan) -> None:
        phase = mesh_pb2.MIGRATION_PHASE_FAILED if server.broken else mesh_pb2.MIGRATION_PHASE_STAGED
        if not server.broken:
            server.staged[plan.id] = plan
        self.say(server, migration=mesh_pb2.MigrationStatus(id=plan.id, phase=phase, reason="test"))

    def _switch(self, server: FakeServer, plan_id: int) -> None:
        plan = server.staged.pop(plan_id)
        server.commits.discard(plan_id)
        running = mesh_pb2.View.FromString(server.running.SerializeToString())
        for placement in running.placement:
            if placement.layer == plan.placement.layer:
                assert placement.version < plan.placement.version
                check_transfers(placement.slots, plan)
                placement.CopyFrom(plan.placement)
        server.running = running
        status = mesh_pb2.MigrationStatus(id=plan_id, phase=mesh_pb2.MIGRATION_PHASE_COMMITTED, step=self.step)
        if server.connected:
            self.say(server, migration=status)
        else:
            server.unsent.append(status)

    def get_ready(self) -> None:
        for server in self.servers.values():
            view = self.view_of(server)
            if (
                server.connected
                and not (server.hung or server.lazy)
                and view is not None
                and view.number > server.ready
            ):
                server.ready = view.number
                server.running = mesh_pb2.View.FromString(view.SerializeToString())
                server.staged, server.commits, server.unsent = {}, set(), []
                self.say(server, view_ready=mesh_pb2.ViewReady(view_number=view.number))
        self.settle()

    # What servers do.

    def connect(self, made: mesh_pb2.Registration) -> Verdict:
        session = self.next_session
        self.next_session += 1
        self.effects.sent[session] = []
        verdict = self.actual.register(session, made, self.now)
        before = self.servers.get(made.server_id)
        self.servers[made.server_id] = FakeServer(made, session, ready=made.view_number)
        if before is not None and made.view_number:
            self.hold(
                made.server_id,
                running=before.running,
                staged=before.staged,
                commits=before.commits,
                unsent=before.unsent,
            )
        self.settle()
        return verdict

    def join(self, *server_ids: str, **fields: Any) -> None:
        for server_id in server_ids:
            self.connect(registration(server_id, **fields))

    def rejoin(self, server_id: str) -> Verdict:
        """The same incarnation on a new stream, carrying the view it runs in."""
        made = mesh_pb2.Registration.FromString(self.servers[server_id].registration.SerializeToString())
        made.ClearField("view")
        made.view_number, made.view_secret = 0, b""
        ready = self.servers[server_id].ready
        if ready:
            running = self.servers[server_id].running
            view = running if running.number == ready else self.history[ready]
            made.view_number, made.view_secret = ready, view.secret
            made.view.CopyFrom(view)
        return self.connect(made)

    def form(self, *server_ids: str) -> None:
        self.join(*server_ids)
        self.advance(1.0)
        assert self.phase is Phase.SERVING, self.actual.why_not_serving()

    def disconnect(self, server_id: str) -> None:
        self.servers[server_id].connected = False
        self.actual.stream_closed(self.servers[server_id].session, self.now)
        self.settle()

    def say(self, server: FakeServer | str, **message: Any) -> None:
        server = self.servers[server] if isinstance(server, str) else server
        self.actual.receive(server.session, mesh_pb2.JoinRequest(**message), self.now)

    def report_broken(self, server_id: str, *suspects: str) -> None:
        broken = mesh_pb2.ViewBroken(view_number=self.view.number, reason="test", suspects=suspects)
        self.say(server_id, view_broken=broken)
        self.settle()

    def leave(self, server_id: str) -> None:
        self.say(server_id, leaving=mesh_pb2.Leaving(reason="test"))
        self.settle()

    # What administrators do.

    def wish(self, layer: int, slots: list[int], version: int | None = None) -> admin_pb2.ApplyRequest:
        """A request for one layer, made for the mesh as it is."""
        if version is None:
            version = self.versions()[layer]
        wanted = mesh_pb2.LayerPlacement(layer=layer, version=version, slots=slots)
        return admin_pb2.ApplyRequest(view_number=self.view.number, layers=[wanted])

    def apply(self, layer: int, slots: list[int]) -> list[mesh_pb2.LayerPlacement]:
        accepted = self.control.applying.request(self.wish(layer, slots))
        self.settle()
        return accepted

    # What can be seen.

    @property
    def view(self) -> mesh_pb2.View:
        return self.actual.view

    @property
    def phase(self) -> Phase:
        return self.actual.phase

    @property
    def history(self) -> dict[int, mesh_pb2.View]:
        return {state.view.number: state.view for state in self.effects.saved}

    @property
    def ranks(self) -> list[str]:
        return [rank.server_id for rank in self.view.ranks]

    def heard(self, server_id: str, kind: str) -> list[Any]:
        messages = self.effects.sent[self.servers[server_id].session]
        return [getattr(m, kind) for m in messages if m.WhichOneof("message") == kind]

    def view_of(self, server: FakeServer) -> mesh_pb2.View | None:
        views = [m.view for m in self.effects.sent[server.session] if m.WhichOneof("message") == "view"]
        mine = [v for v in views if any(rank.incarnation == server.registration.incarnation for rank in v.ranks)]
        return mine[-1] if mine else None

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events.after(0)]

    def state(self, server_id: str) -> str:
        member = self.actual.members.get(server_id)
        assert member is not None
        return mesh_pb2.ServerState.Name(self.actual.state_of(member)).removeprefix("SERVER_STATE_")

    def hold(self, server_id: str, **changes: Any) -> None:
        self.servers[server_id] = replace(self.servers[server_id], **changes)

    def experts(self) -> dict[str, set[int]]:
        """What each server holds in the first layer."""
        from expertmesh.balancer.views import slot_servers

        held: dict[str, set[int]] = {}
        for server_id, expert in zip(slot_servers(self.view), self.view.placement[0].slots, strict=True):
            held.setdefault(server_id, set())
            if expert >= 0:
                held[server_id].add(expert)
        return held

    def versions(self) -> dict[int, int]:
        return {placement.layer: placement.version for placement in self.view.placement}

    def slots(self, layer: int) -> list[int]:
        placement = self.actual.layer_placement(layer)
        assert placement is not None
        return list(placement.slots)

    def agree(self) -> bool:
        """Every rank runs the placement that the balancer knows."""
        return all(
            list(server.running.placement) == list(self.view.placement)
            for server in self.servers.values()
            if server.running.number == self.view.number
        )

    def messages(self, kind: str) -> list[str]:
        return [event.message for event in self.events.after(0) if event.kind == kind]


def check_transfers(old: Sequence[int], plan: mesh_pb2.MigrationPlan) -> None:
    """The transfers alone turn the old table into the new one, and every source holds what is taken from it."""
    slots = [-1 if expert < 0 else old[slot] for slot, expert in enumerate(plan.placement.slots)]
    for transfer in plan.transfers:
        assert not transfer.HasField("source_slot") or old[transfer.source_slot] == transfer.expert
        slots[transfer.slot] = transfer.expert
    assert slots == list(plan.placement.slots)
