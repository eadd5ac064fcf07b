"""Everything of a balancer that leads: made for one turn, gone with it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import cast

import grpc

from expertmesh.balancer.actual import LIVE, Actual
from expertmesh.balancer.admin_service import AdminServicer
from expertmesh.balancer.compiling import KernelCompiler
from expertmesh.balancer.control import PlacementControl
from expertmesh.balancer.draining import Draining
from expertmesh.balancer.evaluation import Answer, Evaluations, EvaluationWorker, Job, eplb_policy, solver_policy
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.load_gauges import LoadGauges
from expertmesh.balancer.membership_service import MembershipServicer, Sessions
from expertmesh.balancer.migration import Stage
from expertmesh.balancer.migrations import Migrations
from expertmesh.balancer.observing import ControlObserver
from expertmesh.balancer.placement_admin import PlacementAdmin
from expertmesh.balancer.placement_file import PlacementFile
from expertmesh.balancer.reconcile import Reconciler
from expertmesh.balancer.replicas import ReplicaRule
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.saver import Outgoing, SavedFirst, StateSaver
from expertmesh.balancer.scaling import Autoscaler
from expertmesh.balancer.scaling_admin import ScaleAdmin
from expertmesh.balancer.scaling_policy import load_policy
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.balancer.standby import Switchboard
from expertmesh.balancer.state import DurableState
from expertmesh.balancer.statistics import Statistics
from expertmesh.balancer.turns import Turn
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.v1 import admin_pb2_grpc, mesh_pb2, mesh_pb2_grpc

log = logging.getLogger(__name__)

SOON_S = 0.01
"""What ranks say as routine may wait so long for more of it: a round of the loop costs more than a message."""
_SECRET_BYTES = 32
_UNSAVED_EVENTS = 1000
"""More than a balancer reports from one save to the next: a mesh that changes is saved."""


class Outside:
    """``Effects`` on the real world."""

    def __init__(
        self, outgoing: Outgoing, saver: StateSaver, evaluations: Evaluations, observer: ControlObserver
    ) -> None:
        self.send: Callable[[int, mesh_pb2.JoinResponse], None] = outgoing.send
        self.close: Callable[[int], None] = outgoing.close
        self.save: Callable[[DurableState], None] = saver.ask
        self.evaluate: Callable[[Job], None] = evaluations.start
        self.view_published: Callable[[mesh_pb2.View, str], str] = observer.view_published
        self.migration_planned: Callable[[mesh_pb2.MigrationPlan, str], str] = observer.migration_planned
        self.migration_stage: Callable[[int, str, float], None] = observer.migration_stage
        self.migration_ended: Callable[[int, str, str], None] = observer.migration_ended

    def new_secret(self) -> bytes:
        return secrets.token_bytes(_SECRET_BYTES)


class Driver:
    """Runs the reconcile loop whenever something came in, and when it is due.

    Args:
        may_act: asked before each action.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        actual: Actual,
        migrations: Migrations,
        loads: LoadGauges,
        metrics: Metrics,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._may_act = may_act
        self._reconciler = reconciler
        self._actual = actual
        self._migrations = migrations
        self._loads = loads
        self._metrics = metrics
        self._woken = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        self._states: set[str] = set()

    def wake(self) -> None:
        self._woken.set()

    def wake_soon(self) -> None:
        """For what can wait a moment: what else comes in it is dealt with in the same round. From the event loop."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(SOON_S, self._woken.set)

    async def run(self) -> None:
        while True:
            self._woken.clear()
            if self._soon is not None:
                self._soon.cancel()
                self._soon = None
            self._tick_until_done()
            self._show_missing()
            now = time.monotonic()
            self._loads.update(now)
            started_s = min((migration.started_s for migration in self._migrations), default=now)
            self._metrics.balancer_migration_oldest_seconds.set(now - started_s)
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with a wake.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._reconciler.due_in_s(time.monotonic())):
                    await self._woken.wait()

    def _tick_until_done(self) -> None:
        action: str | None = ""
        acted = False
        while action is not None and self._may_act():
            started_s = time.monotonic()
            action = self._reconciler.tick(started_s)
            took_s = time.monotonic() - started_s
            self._metrics.reconcile_duration_seconds.observe(took_s)
            if action is not None:
                log.info("%s (%.1f ms)", action, 1e3 * took_s)
                acted = True
        if acted:
            self._show()

    def _show_missing(self) -> None:
        """In every round: what there should be changes without an action, too."""
        scale = self._actual.scale
        assert scale is not None, "of a balancer that leads"
        there = Counter(member.role_name for member in self._actual.staying())
        for role, target in scale.targets.items():
            self._metrics.balancer_servers_missing.set(max(target - there[role], 0), server_role=role)

    def _show(self) -> None:
        """Gauges change only with an action."""
        actual = self._actual
        self._metrics.view_number.set(actual.view.number if actual.phase in LIVE else 0)
        counts = Counter(
            mesh_pb2.ServerState.Name(actual.state_of(member)).removeprefix("SERVER_STATE_").lower()
            for member in actual.members
        )
        self._states |= counts.keys()
        for state in self._states:
            self._metrics.server_states.set(counts[state], state=state)
        stages = Counter(migration.stage for migration in self._migrations)
        for stage in Stage:
            self._metrics.balancer_migrations_running.set(stages[stage], stage=stage)


class Leading:
    """A balancer at work on the state that its predecessor left.

    Args:
        store_address: of the rendezvous store that its views name.
        initial: mode offline: the placement that the first view starts with.
        page: URL of the page, for whoever asks.

    Raises:
        UserError: there is no such scale policy.
    """

    def __init__(
        self,
        config: MeshConfig,
        turn: Turn,
        state: DurableState,
        *,
        store_address: str,
        initial: PlacementFile | None,
        telemetry: Telemetry,
        page: str = "",
    ) -> None:
        self._page = page
        # Above every id of an earlier process, also when its last save was lost.
        state.ledger.last_id = max(state.ledger.last_id, time.time_ns() // 1_000_000)
        metrics = telemetry.metrics
        self._observer = ControlObserver(telemetry)
        unsaved = _UNSAVED_EVENTS if state.events else 0
        self.events = EventLog(time.time, state.events, unsaved=unsaved, heard=self._observer.heard)
        self._config = config
        self._turn = turn
        self._sessions = Sessions()
        self._saver = StateSaver(turn.state, self.events, turn.save_retry_s)
        self._compiler = KernelCompiler()
        rule = ReplicaRule.of(config.expert)
        make_policy = (
            partial(eplb_policy, config.expert.num_slots, rule=rule)
            if config.balancer.policy == "eplb"
            else partial(solver_policy, config.expert.num_slots, rule=rule)
        )
        self._worker = EvaluationWorker(make_policy, self._compiler.finished)
        self._evaluations = Evaluations(self._worker)
        outgoing: Outgoing = self._sessions
        if turn.saves_first:
            outgoing = SavedFirst(self._sessions, self._saver, turn.holds)
        self._outside = Outside(outgoing, self._saver, self._evaluations, self._observer)
        self._actual = Actual(config.balancer, effects=self._outside, events=self.events, state=state)
        statistics = Statistics(config.balancer.stats_half_life_tokens)
        self._routing = RoutingDesk(self._actual, statistics, outgoing.send, time.monotonic)
        self._control = PlacementControl.create(
            config.balancer, self._actual, statistics=statistics, effects=self._outside, events=self.events, rule=rule
        )
        self._targets = ScaleTargets(config, self._actual, self._outside, self.events)
        self._draining = Draining(self._actual, self._outside, self.events, self._targets)
        policy = load_policy(config.scaling.hook)
        autoscaler = Autoscaler(config, self._actual, self._targets, self._draining, self.events, policy)
        reconciler = Reconciler(
            config,
            self._actual,
            control=self._control,
            effects=self._outside,
            events=self.events,
            targets=self._targets,
            autoscaler=autoscaler,
            store_address=store_address,
            initial=initial,
        )
        loads = LoadGauges(self._routing, metrics)
        self._driver = Driver(reconciler, self._actual, self._control.migrations, loads, metrics, turn.holds)
        self._evaluations.on_answer = partial(self._answered, metrics)
        if self._control.online.mode == "online":
            self._worker.warm_up()
        self._saver.ask(self._actual.durable())

    def _answered(self, metrics: Metrics, answer: Answer) -> None:
        metrics.balancer_evaluation_duration_seconds.observe(answer.seconds)
        self._control.online.answered(answer, time.monotonic())
        self._driver.wake()

    def answer_calls(self, board: Switchboard) -> None:
        """Put the services on it, for as long as the turn holds."""
        server = cast(grpc.aio.Server, board)  # as far as generated code looks at it
        driver = self._driver
        membership = MembershipServicer(
            self._actual, self._sessions, self._routing, driver.wake, driver.wake_soon, time.monotonic
        )
        mesh_pb2_grpc.add_MembershipServiceServicer_to_server(membership, server)
        placement = PlacementAdmin(
            self._actual,
            self._control,
            self._worker,
            max_loads=self._config.balancer.max_slots_per_update,
            wake=self._driver.wake,
            clock=time.monotonic,
        )
        scale_policy = self._config.scaling.policy
        scaling = ScaleAdmin(self._targets, self._draining, policy=scale_policy, wake=self._driver.wake)
        self.admin = AdminServicer(
            self._actual, self.events, placement, scaling, self._routing, time.monotonic, page=self._page
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self.admin, server)
        board.open(self._turn.holds)

    def tasks(self) -> list[asyncio.Task[None]]:
        """What runs as long as the balancer leads; a part that fails ends its task with the error."""
        return [
            asyncio.create_task(self._driver.run(), name="reconcile"),
            asyncio.create_task(self._saver.run(), name="state-saver"),
        ]

    def hang_up(self) -> None:
        """End every server's stream."""
        self._sessions.close_all()

    async def close(self) -> None:
        """After the services: end what still computes, and save for the last time."""
        await self._evaluations.close()
        await self._worker.close()
        await self._compiler.close()
        self._observer.close()
        if self._turn.holds():
            self._saver.ask(self._actual.durable())
            await self._saver.flush()
