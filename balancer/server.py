"""The balancer as a process: state, services, the loop's driver, the rendezvous store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import grpc

from expertmesh.balancer.actual import LIVE, Actual
from expertmesh.balancer.compiling import KernelCompiler
from expertmesh.balancer.control import PlacementControl
from expertmesh.balancer.draining import Draining
from expertmesh.balancer.evaluation import Answer, Evaluations, EvaluationWorker, Job, eplb_policy, solver_policy
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.load_gauges import LoadGauges
from expertmesh.balancer.migrations import Migrations, Stage
from expertmesh.balancer.placement_admin import PlacementAdmin
from expertmesh.balancer.placement_file import PlacementFile, read_placement_file
from expertmesh.balancer.reconcile import Reconciler
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.service import AdminServicer, MembershipServicer, Sessions
from expertmesh.balancer.state import DurableState, StateFile, fresh_state
from expertmesh.balancer.statistics import Statistics
from expertmesh.balancer.store import RendezvousStore
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2, mesh_pb2_grpc

log = logging.getLogger(__name__)

_SECRET_BYTES = 32
_STOP_GRACE_S = 0.5
_SAVE_RETRY_S = 5.0


class StateSaver:
    """Writes the newest state on a thread: a slow or full disk holds up nothing else."""

    def __init__(self, file: StateFile, events: EventLog) -> None:
        self._file = file
        self._events = events
        self._newest: DurableState | None = None
        self._asked = asyncio.Event()
        self._failed = False

    def ask(self, state: DurableState) -> None:
        self._newest = state
        self._asked.set()

    async def run(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            if not await self.flush():
                await asyncio.sleep(_SAVE_RETRY_S)
                self._asked.set()

    async def flush(self) -> bool:
        """Write what was asked for last; False when that failed."""
        state = self._newest
        if state is None:
            return True
        try:
            await asyncio.to_thread(self._file.save, state)
        except OSError as error:
            if not self._failed:
                text = f"the state cannot be saved ({error}); serving goes on, and saving is tried again"
                self._events.add("state_not_saved", "balancer", text, logging.ERROR)
            self._failed = True
            return False
        if self._failed:
            self._events.add("state_saved", "balancer", "the state can be saved again")
        self._failed = False
        return True


class Outside:
    """``Effects`` on the real world."""

    def __init__(self, sessions: Sessions, saver: StateSaver, evaluations: Evaluations, metrics: Metrics) -> None:
        self._metrics = metrics
        self.send: Callable[[int, mesh_pb2.JoinResponse], None] = sessions.send
        self.close: Callable[[int], None] = sessions.close
        self.save: Callable[[DurableState], None] = saver.ask
        self.evaluate: Callable[[Job], None] = evaluations.start

    def new_secret(self) -> bytes:
        return secrets.token_bytes(_SECRET_BYTES)

    def view_published(self, reason: str) -> None:
        self._metrics.view_changes.add(reason=reason)

    def migration_stage(self, stage: str, seconds: float) -> None:
        self._metrics.balancer_migration_stage_seconds.observe(seconds, stage=stage)

    def migration_ended(self, outcome: str) -> None:
        self._metrics.balancer_migrations.add(outcome=outcome)


class Driver:
    """Runs the reconcile loop whenever something came in, and when it is due."""

    def __init__(
        self,
        reconciler: Reconciler,
        actual: Actual,
        migrations: Migrations,
        loads: LoadGauges,
        metrics: Metrics,
    ) -> None:
        self._reconciler = reconciler
        self._actual = actual
        self._migrations = migrations
        self._loads = loads
        self._metrics = metrics
        self._woken = asyncio.Event()
        self._states: set[str] = set()

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        while True:
            self._woken.clear()
            self._tick_until_done()
            self._loads.update(time.monotonic())
            # Not wait_for: in Python 3.11 it loses a cancellation that comes together with a wake.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._reconciler.due_in_s(time.monotonic())):
                    await self._woken.wait()

    def _tick_until_done(self) -> None:
        action: str | None = ""
        while action is not None:
            started_s = time.monotonic()
            action = self._reconciler.tick(started_s)
            took_s = time.monotonic() - started_s
            self._metrics.reconcile_duration_seconds.observe(took_s)
            if action is not None:
                log.info("%s (%.1f ms)", action, 1e3 * took_s)
                self._show()

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


async def serve(
    config: MeshConfig,
    *,
    server_id: str,
    stop: asyncio.Event,
    ready: Callable[[str], None],
    telemetry: Telemetry,
) -> None:
    """Be the mesh's balancer until ``stop`` is set.

    Args:
        ready: called with ``host:port`` as soon as servers can register.

    Raises:
        UserError: the port, the state folder, the data plane's interface or the placement file cannot be used.
    """
    file = StateFile(config.balancer.state_dir or Path(".expertmesh") / config.name)
    try:
        store = RendezvousStore(config.dataplane.interface_host)
        try:
            await _serve(config, server_id, stop, ready, telemetry, file, store)
        finally:
            store.close()
    finally:
        file.close()


async def _serve(
    config: MeshConfig,
    server_id: str,
    stop: asyncio.Event,
    ready: Callable[[str], None],
    telemetry: Telemetry,
    file: StateFile,
    store: RendezvousStore,
) -> None:
    initial = _initial_placement(config)
    known = file.load()
    state = known or fresh_state()
    # Above every id of an earlier process, also when its last save was lost.
    state.ledger.last_id = max(state.ledger.last_id, time.time_ns() // 1_000_000)
    events, metrics = EventLog(time.time, state.events), telemetry.metrics
    sessions, saver = Sessions(), StateSaver(file, events)
    compiler = KernelCompiler()
    make_policy = (
        partial(eplb_policy, config.expert.num_slots)
        if config.balancer.policy == "eplb"
        else partial(solver_policy, config.expert.num_slots, replica_quotas=config.balancer.replica_quotas)
    )
    worker = EvaluationWorker(make_policy, compiler.finished)
    evaluations = Evaluations(worker)
    outside = Outside(sessions, saver, evaluations, metrics)
    actual = Actual(config.balancer, effects=outside, events=events, state=state)
    statistics = Statistics(config.balancer.stats_half_life_tokens)
    routing = RoutingDesk(actual, statistics, sessions.send, time.monotonic)
    control = PlacementControl.create(config.balancer, actual, statistics=statistics, effects=outside, events=events)
    reconciler = Reconciler(
        config,
        actual,
        control=control,
        effects=outside,
        events=events,
        store_address=store.address,
        initial=initial,
    )
    driver = Driver(reconciler, actual, control.migrations, LoadGauges(routing, metrics), metrics)

    def on_answer(answer: Answer) -> None:
        metrics.balancer_evaluation_duration_seconds.observe(answer.seconds)
        control.online.answered(answer, time.monotonic())
        driver.wake()

    evaluations.on_answer = on_answer
    if control.online.mode == "online":
        worker.warm_up()

    def register(server: grpc.aio.Server) -> Sequence[str]:
        membership = MembershipServicer(actual, sessions, routing, driver.wake, time.monotonic)
        mesh_pb2_grpc.add_MembershipServiceServicer_to_server(membership, server)
        placement = PlacementAdmin(
            actual,
            control,
            worker,
            max_loads=config.balancer.max_slots_per_update,
            wake=driver.wake,
            clock=time.monotonic,
        )
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminServicer(actual, events, placement, Draining(actual, outside, events), routing, time.monotonic), server
        )
        return (
            mesh_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,
            admin_pb2.DESCRIPTOR.services_by_name["AdminService"].full_name,
        )

    server = await rpc.start_server(
        host=config.balancer.host,
        port=config.balancer.port,
        tls=config.tls,
        register=register,
        telemetry=telemetry,
        key="balancer.port",
    )
    last = f"with the state of view {state.view.number}" if known else "without earlier state"
    events.add("balancer_started", server_id, f"mesh {state.mesh_id} {last}")
    saver.ask(actual.durable())
    server.set_serving(True)
    ready(server.address)
    try:
        await _run_until(stop, driver, saver, store)
    finally:
        sessions.close_all()
        await server.stop(_STOP_GRACE_S)
        await evaluations.close()
        await worker.close()
        await compiler.close()
        saver.ask(actual.durable())
        await saver.flush()


def _initial_placement(config: MeshConfig) -> PlacementFile | None:
    """
    Raises:
        UserError: mode offline without a placement file, or with one that cannot be used.
    """
    path = config.balancer.placement_file
    if config.balancer.mode != "offline":
        return None
    if path is None:
        raise UserError(
            "balancer.placement_file", "is unset, and mode offline starts from it", "name a file, or use mode static"
        )
    return read_placement_file(path)


async def _run_until(stop: asyncio.Event, driver: Driver, saver: StateSaver, store: RendezvousStore) -> None:
    """Until ``stop``, or until a part fails: then its error rises."""
    opening = asyncio.create_task(store.open(), name="rendezvous-store")
    tasks = [
        asyncio.create_task(driver.run(), name="reconcile"),
        asyncio.create_task(saver.run(), name="state-saver"),
        asyncio.create_task(stop.wait(), name="balancer-stop"),
    ]
    try:
        done, _ = await asyncio.wait({*tasks, opening}, return_when=asyncio.FIRST_COMPLETED)
        if done == {opening} and opening.exception() is None:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        # The store's thread cannot be interrupted; what it opens must not outlive this call.
        await asyncio.gather(*tasks, opening, return_exceptions=True)
