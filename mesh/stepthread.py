"""The step thread of a rank: from view to view, whatever breaks in between."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from typing import Any, cast

import torch

from expertmesh.mesh.background import preempt_nobody
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.dataplane import DataPlane, open_dataplane, uses_links
from expertmesh.mesh.dataplane.base import PlaneShape
from expertmesh.mesh.dataplane.device_faults import as_device_lost
from expertmesh.mesh.device import CPU
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError
from expertmesh.mesh.framing import Link, Waker
from expertmesh.mesh.graphs import StepGraphs
from expertmesh.mesh.halves import AttentionHalf, DeviceAttentionHalf, ExpertHalf
from expertmesh.mesh.inbox import Inbox
from expertmesh.mesh.lockstep import Lockstep
from expertmesh.mesh.meet import Links, meet
from expertmesh.mesh.migration import MigrationContext, Migrations, failed_status
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.padding import StepSizes, step_sizes
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.rank_security import RankSecurity
from expertmesh.mesh.reporting import RoutingObserver
from expertmesh.mesh.sidegroup import open_side_group
from expertmesh.mesh.stepclock import StepClock
from expertmesh.mesh.steploop import LoopContext, Progress, StepLoop
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.mesh.view import ViewInfo
from expertmesh.mesh.viewtrace import ViewTrace
from expertmesh.mesh.weight_reads import WeightTransport
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)


class _Stopping(Exception):
    """The process is stopping: the rank leaves its view without waiting for the others."""


class StepThread:
    """Joins each view that has this rank, steps in it until it ends or breaks, and waits for the next."""

    def __init__(
        self,
        config: MeshConfig,
        *,
        spec: ModelSpec,
        attention: AttentionHalf | None,
        experts: ExpertHalf | None,
        observer: RoutingObserver | None,
        telemetry: Telemetry,
        listener: socket.socket,
        waker: Waker,
        inbox: Inbox,
        device: torch.device = CPU,
        security: RankSecurity | None = None,
        weights: WeightTransport | None = None,
        report: Callable[[mesh_pb2.JoinRequest], None],
        view_ended: Callable[[], None],
    ) -> None:
        self._config = config
        self._spec = spec
        self._attention = attention
        self._experts = experts
        self._observer = observer
        self._telemetry = telemetry
        self._metrics = telemetry.metrics
        self._clock = StepClock(telemetry, has_experts=experts is not None)
        self._listener = listener
        self._waker = waker
        self._inbox = inbox
        self._device = device
        self._security = security
        self._weights = weights
        self._report = report
        self._view_ended = view_ended
        self.progress = Progress()
        self._migrations: Migrations | None = None
        self._called_off: Migrations | None = None
        self._links: Links | None = None
        self._plane: DataPlane[Any] | None = None
        self._routing: RoutingTables | None = None
        self._broken_ns = 0  # wall time since when no view serves here, because one broke
        self.state = mesh_pb2.SERVER_STATE_STARTING

    @property
    def longest_wait_s(self) -> float:
        """The thread looks at its inbox at least this often."""
        return self._config.dataplane.timeout_s + self._config.dataplane.idle_tick_s + Migrations.LONGEST_JOIN_S

    @property
    def view(self) -> ViewInfo | None:
        """The view that the rank steps in, with the placements that run now."""
        migrations = self._migrations
        return migrations.view if migrations is not None else None

    def hear(self, message: mesh_pb2.JoinResponse) -> None:
        """A plan, commit or abort of a migration; from the event loop."""
        migrations = self._migrations
        if migrations is not None:
            migrations.hear(message)
            return
        kind = message.WhichOneof("message")
        log.info("a %s of a migration came while this rank is in no view", kind)
        if kind == "plan":
            status = failed_status(message.plan.id, "this rank is in no view")
            self._report(mesh_pb2.JoinRequest(migration=status))

    def abandon(self, before: int) -> None:
        """End the current view if it is older than ``before``, wherever it hangs; from any thread."""
        view, links, plane = self.view, self._links, self._plane
        if view is not None and links is not None and view.number < before:
            log.warning("view %d did not end although view %d is out: leaving it", view.number, before)
            links.abandon()
            if plane is not None:
                plane.abandon()

    def run(self) -> None:
        """Until the inbox is closed.

        Raises:
            DeviceLostError: this process can be in no view any more.
        """
        preempt_nobody()
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread: kernels are launched there
        last = 0
        while not self._inbox.closed:
            view = self._inbox.next_view(last, timeout_s=1.0)
            if view is None:
                self._say_why_not_serving()
                continue
            last = view.number
            self._serve(view)
        if self._called_off is not None:  # the process ends more quietly without threads that still run
            self._called_off.close()

    def _serve(self, view: ViewInfo) -> None:
        links, plane, lockstep, migrations, loop = None, None, None, None, None
        self.state = mesh_pb2.SERVER_STATE_JOINING
        started = time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # of the last view's graphs: what the next plane allocates is not torch's
        tracing = ViewTrace(self._telemetry, view, self._broken_ns)
        try:
            if self._experts is not None:
                self._experts.load(view.local_slots())
            tracing.done("load slots")
            links = self._links = self._meet(view)
            tracing.done("meet")
            plane = self._plane = self._open_plane(view, links)
            tracing.done("open data plane")
            lockstep = self._lockstep(view, links.lockstep)
            routing = self._routing = self._routing_of(view)
            if plane.is_on_device and self._attention is not None:
                cast(DeviceAttentionHalf, self._attention).bind(routing, Topology.of(view), plane.check)
            migrations = self._open_migrations(view, routing, links)
            loop = StepLoop(self._context(view, plane, lockstep, migrations, routing), self.progress)
            loop.capture()
            tracing.done("prepare steps")
            self._enter(view, migrations)
            log.info(
                "in view %d as rank %d of %d after %.2f s (%s)",
                view.number, view.rank, view.size, time.monotonic() - started, tracing,
            )  # fmt: skip
            self._broken_ns = 0
            tracing.end()
            loop.run()
            log.info("view %d ended after step %d", view.number, self.progress.step)
        except _Stopping:
            log.info("left view %d to stop", view.number)
        except RuntimeError as caught:
            error = as_device_lost(caught) or caught
            if not isinstance(error, DataPlaneError):
                raise
            self._broken_ns = self._broken_ns or time.time_ns()
            tracing.end(str(error))
            self._report_broken(view, error)
            if isinstance(error, DeviceLostError):  # the process has to be started again
                raise error from caught
        finally:
            self._migrations = self._plane = None
            try:
                _drop(plane, loop)
            finally:  # also where the device is lost: peers hear at once that this rank has left
                if lockstep is not None:
                    lockstep.close()
                self._links = None
                if links is not None:
                    links.close()
                if migrations is not None:
                    migrations.call_off()
                    self._called_off = migrations
                self._view_ended()

    def _report_broken(self, view: ViewInfo, error: DataPlaneError) -> None:
        self.state = mesh_pb2.SERVER_STATE_BROKEN
        log.warning("view %d broke: %s", view.number, error)
        broken = mesh_pb2.ViewBroken(
            view_number=view.number, reason=str(error), suspects=view.server_ids(error.suspects)
        )
        self._report(mesh_pb2.JoinRequest(view_broken=broken))

    def _routing_of(self, view: ViewInfo) -> RoutingTables:
        return RoutingTables(view.proto.placement, self._spec.num_experts, Topology.of(view), self._routing)

    def _meet(self, view: ViewInfo) -> Links:
        return meet(
            view,
            self._listener,
            self._waker,
            timeout_s=self._config.balancer.view_timeout_s,
            with_data=uses_links(self._config.dataplane, self._device),
            superseded=lambda: self._is_superseded(view),
            security=self._security,
        )

    def _is_superseded(self, view: ViewInfo) -> bool:
        return self._inbox.closed or self._inbox.known_view > view.number

    def _open_plane(self, view: ViewInfo, links: Links) -> DataPlane[Any]:
        return open_dataplane(
            self._config.dataplane,
            view,
            self._plane_shape(view),
            links.data,
            self._device,
            join_s=self._config.balancer.view_timeout_s,
            superseded=lambda: self._is_superseded(view),
        )

    def _lockstep(self, view: ViewInfo, links: dict[int, Link]) -> Lockstep:
        dataplane = self._config.dataplane
        return Lockstep(
            view,
            links,
            self._waker,
            self._next_view,
            lambda: self._migrations.listed() if self._migrations is not None else (),
            timeout_s=dataplane.timeout_s,
            idle_tick_s=dataplane.idle_tick_s,
            join_s=self._config.balancer.view_timeout_s if self._device.type == "cuda" else 0.0,  # graphs are captured
        )

    def _open_migrations(self, view: ViewInfo, routing: RoutingTables, links: Links) -> Migrations:
        bytes_per_s = self._config.balancer.migration_bytes_per_s
        side = None
        if links.side:
            reads = self._weights.reads() if self._weights is not None else None
            side = open_side_group(view, links.hand_over_side(), bytes_per_s, reads)
        migrations = Migrations(
            MigrationContext(
                view=view,
                num_experts=self._spec.num_experts,
                experts=self._experts,
                routing=routing if self._attention is not None else None,
                side=side,
                report=self._report,
                wake=self._waker.wake,
                telemetry=self._telemetry,
                device=self._device,
            )
        )
        migrations.start()
        return migrations

    def _enter(self, view: ViewInfo, migrations: Migrations) -> None:
        self._migrations = migrations
        self.progress.step = 0
        if self._observer is not None:
            self._observer.enter_view(view)
        self.state = mesh_pb2.SERVER_STATE_SERVING
        self._metrics.view_number.set(view.number)
        self._report(mesh_pb2.JoinRequest(view_ready=mesh_pb2.ViewReady(view_number=view.number)))
        if self._attention is not None:
            self._attention.set_serving(True)
            self._attention.touched_by(view.proto.traceparent, "view_change")

    def _context(
        self,
        view: ViewInfo,
        plane: DataPlane[Any],
        lockstep: Lockstep,
        migrations: Migrations,
        routing: RoutingTables,
    ) -> LoopContext:
        has_graphs = self._device.type == "cuda"
        sizes = step_sizes(self._config.attention, self._config.dataplane.micro_batches) if has_graphs else StepSizes()
        return LoopContext(
            view=view,
            attention=self._attention,
            experts=self._experts,
            plane=plane,
            lockstep=lockstep,
            migrations=migrations,
            routing=routing,
            observer=self._observer,
            moe_layers=self._spec.moe_layers,
            hidden_size=self._spec.hidden_size,
            top_k=self._spec.top_k,
            dtype=self._spec.dtype,
            max_num_tokens=self._max_num_tokens(view),
            clock=self._clock,
            graphs=StepGraphs(self._device, is_alone=view.size == 1) if has_graphs else None,
            sizes=sizes,
            device=self._device,
        )

    def _max_num_tokens(self, view: ViewInfo) -> int:
        """A rank on its own on a device sends nothing, so that nothing bounds what it exchanges."""
        if self._device.type == "cuda" and view.size == 1:
            return self._config.attention.max_num_batched_tokens
        return self._config.dataplane.max_num_tokens

    def _next_view(self) -> int:
        """What the lockstep tells the leader; it is asked before every step, so this is where a rank stops."""
        if self._inbox.closed:
            raise _Stopping
        if self._inbox.is_fenced:
            raise DataPlaneError(f"this rank was fenced: {self._inbox.pause_reason}")
        return self._inbox.known_view

    def _plane_shape(self, view: ViewInfo) -> PlaneShape:
        return PlaneShape(
            rank=view.rank,
            size=view.size,
            expert_ranks=view.expert_ranks,
            slots_per_rank=view.slots_per_rank,
            hidden_size=self._spec.hidden_size,
            top_k=self._spec.top_k,
            dtype=self._spec.dtype,
            max_num_tokens=self._config.dataplane.max_num_tokens,
        )

    def _say_why_not_serving(self) -> None:
        if self._attention is not None:
            self._attention.set_serving(False, self._inbox.pause_reason or "waiting for a view")


def _drop(plane: DataPlane[Any] | None, loop: StepLoop | None) -> None:
    """Graphs have the plane's exchanges in them: they go when nothing of it runs, and before its connections."""
    if plane is not None:
        plane.stop()
    if loop is not None:
        loop.close()
    if plane is not None:
        plane.close()
