"""The step thread of a rank: from view to view, whatever breaks in between."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from expertmesh.mesh.background import preempt_nobody
from expertmesh.mesh.dataplane import DataPlane
from expertmesh.mesh.dataplane.device_faults import as_device_lost
from expertmesh.mesh.errors import DataPlaneError, DeviceLostError
from expertmesh.mesh.halves import DeviceAttentionHalf
from expertmesh.mesh.meet import Links
from expertmesh.mesh.migration import Migrations, failed_status
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.steploop import Progress, StepLoop
from expertmesh.mesh.view import ViewInfo
from expertmesh.mesh.viewopening import RankParts, ViewOpener
from expertmesh.mesh.viewtrace import ViewTrace
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)


class _Stopping(Exception):
    """The process is stopping: the rank leaves its view without waiting for the others."""


class StepThread:
    """Joins each view that has this rank, steps in it until it ends or breaks, and waits for the next."""

    def __init__(self, rank: RankParts, *, view_ended: Callable[[], None]) -> None:
        self._rank = rank
        self._opener = ViewOpener(rank)
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
        dataplane = self._rank.config.dataplane
        return dataplane.timeout_s + dataplane.idle_tick_s + Migrations.LONGEST_JOIN_S

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
            self._rank.report(mesh_pb2.JoinRequest(migration=status))

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
        if self._rank.device.type == "cuda":
            torch.cuda.set_device(self._rank.device)  # of this thread: kernels are launched there
        last = 0
        while not self._rank.inbox.closed:
            view = self._rank.inbox.next_view(last, timeout_s=1.0)
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
        if self._rank.device.type == "cuda":
            torch.cuda.empty_cache()  # of the last view's graphs: what the next plane allocates is not torch's
        tracing = ViewTrace(self._rank.telemetry, view, self._broken_ns)
        try:
            if self._rank.experts is not None:
                self._rank.experts.load(view.local_slots())
            tracing.done("load slots")
            links = self._links = self._opener.meet(view)
            tracing.done("meet")
            plane = self._plane = self._opener.plane(view, links)
            tracing.done("open data plane")
            lockstep = self._opener.lockstep(view, links, self._next_view, self._listed)
            routing = self._routing = self._routing_of(view)
            if plane.is_on_device and self._rank.attention is not None:
                cast(DeviceAttentionHalf, self._rank.attention).bind(routing, Topology.of(view), plane.check)
            migrations = self._opener.migrations(view, routing, links)
            loop = StepLoop(self._opener.context(view, plane, lockstep, migrations, routing), self.progress)
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
        self._rank.report(mesh_pb2.JoinRequest(view_broken=broken))

    def _routing_of(self, view: ViewInfo) -> RoutingTables:
        return RoutingTables(view.proto.placement, self._rank.spec.num_experts, Topology.of(view), self._routing)

    def _enter(self, view: ViewInfo, migrations: Migrations) -> None:
        self._migrations = migrations
        self.progress.step = 0
        if self._rank.observer is not None:
            self._rank.observer.enter_view(view)
        self.state = mesh_pb2.SERVER_STATE_SERVING
        self._rank.telemetry.metrics.view_number.set(view.number)
        self._rank.report(mesh_pb2.JoinRequest(view_ready=mesh_pb2.ViewReady(view_number=view.number)))
        if self._rank.attention is not None:
            self._rank.attention.set_serving(True)
            self._rank.attention.touched_by(view.proto.traceparent, "view_change")

    def _listed(self) -> Sequence[int]:
        """The migrations that the lockstep may have all ranks switch to."""
        return self._migrations.listed() if self._migrations is not None else ()

    def _next_view(self) -> int:
        """What the lockstep tells the leader; it is asked before every step, so this is where a rank stops."""
        if self._rank.inbox.closed:
            raise _Stopping
        if self._rank.inbox.is_fenced:
            raise DataPlaneError(f"this rank was fenced: {self._rank.inbox.pause_reason}")
        return self._rank.inbox.known_view

    def _say_why_not_serving(self) -> None:
        if self._rank.attention is not None:
            self._rank.attention.set_serving(False, self._rank.inbox.pause_reason or "waiting for a view")


def _drop(plane: DataPlane[Any] | None, loop: StepLoop | None) -> None:
    """Graphs have the plane's exchanges in them: they go when nothing of it runs, and before its connections."""
    if plane is not None:
        plane.stop()
    if loop is not None:
        loop.close()
    if plane is not None:
        plane.close()
