"""Placements that an administrator asked for: checked as a whole, then migrated to layer by layer.

A request is a compare-and-set: it names the view and the version of every layer that it replaces. Pure but for what it
starts.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence

import grpc

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.migrations import Migrations
from expertmesh.balancer.placement_rules import PlacementError, arrange
from expertmesh.balancer.policy import Layout
from expertmesh.balancer.refusal import RefusedError
from expertmesh.v1 import admin_pb2, mesh_pb2


class Applying:
    """``layer_updates_per_iter`` layers migrate at a time, at least one."""

    def __init__(self, actual: Actual, migrations: Migrations, events: EventLog) -> None:
        self._actual = actual
        self._migrations = migrations
        self._events = events
        self._queue: deque[mesh_pb2.LayerPlacement] = deque()
        self._view_number = 0
        self.layers_at_a_time = 1

    @property
    def is_busy(self) -> bool:
        return bool(self._queue)

    @property
    def num_queued(self) -> int:
        """Layers that are not migrating yet."""
        return len(self._queue)

    def request(self, request: admin_pb2.ApplyRequest) -> list[mesh_pb2.LayerPlacement]:
        """Accept all layers of the request or none. Returns them with the versions that they will get; a layer that is
        placed so already keeps its version and is not migrated.

        Raises:
            RefusedError: INVALID_ARGUMENT, ABORTED where the mesh has moved on since the placement was made, or
                FAILED_PRECONDITION while no view serves or a migration runs.
        """
        self._check_model(request)
        actual = self._actual
        if actual.phase is not Phase.SERVING:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f"nothing is served: {actual.why_not_serving()}")
        if request.view_number != actual.view.number:
            text = f"the mesh is at view {actual.view.number}, the placement was made for view {request.view_number}"
            raise RefusedError(grpc.StatusCode.ABORTED, text)
        wanted = self._arranged(request)
        self._check_versions(wanted)
        if self.is_busy or len(self._migrations):
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, self._why_busy())
        accepted = [self._accept(placement) for placement in wanted]
        changed = f"{len(self._queue)} of {len(accepted)} layers change"
        self._events.add("apply_accepted", f"view {actual.view.number}", changed)
        return accepted

    def tick(self, now: float) -> str | None:
        """Start the next migration that is due; None when none is."""
        if not self._queue:
            return None
        actual = self._actual
        if actual.phase is not Phase.SERVING or actual.view.number != self._view_number:
            count = len(self._queue)
            self._queue.clear()
            text = f"{count} layers are not migrated: view {self._view_number} is over"
            self._events.add("apply_dropped", f"view {self._view_number}", text, logging.WARNING)
            return f"dropped {count} layers to apply"
        if len(self._migrations) >= self.layers_at_a_time:
            return None
        placement = self._queue.popleft()
        why = "asked for by an administrator"
        migration = self._migrations.start(placement.layer, placement.slots, {}, why, now)
        return f"planned {migration.subject}"

    def _check_model(self, request: admin_pb2.ApplyRequest) -> None:
        model, fingerprint = self._actual.model, self._actual.fingerprint
        layers = [placement.layer for placement in request.layers]
        if not layers:
            raise _invalid("layers is empty: nothing to apply")
        if len(set(layers)) < len(layers):
            raise _invalid("a layer is placed twice: keep one table a layer")
        if request.fingerprint and fingerprint and request.fingerprint != fingerprint:
            raise _invalid(
                f"the placement was made for the model fingerprint {request.fingerprint}, this mesh runs {fingerprint}"
            )
        if request.num_experts and model.num_experts and request.num_experts != model.num_experts:
            raise _invalid(
                f"the placement was made for {request.num_experts} experts a layer, this model has {model.num_experts}"
            )
        unknown = sorted(set(layers) - set(model.moe_layers))
        if unknown and model.num_experts:
            raise _invalid(f"layer {unknown[0]} is no MoE layer of {model.name}; it has {list(model.moe_layers)}")

    def _arranged(self, request: admin_pb2.ApplyRequest) -> list[mesh_pb2.LayerPlacement]:
        layout, num_experts = Layout.of(self._actual.view), self._actual.model.num_experts
        try:
            return [arrange(layer, request.slot_servers, layout, num_experts) for layer in request.layers]
        except PlacementError as error:
            raise _invalid(str(error)) from None

    def _check_versions(self, wanted: Sequence[mesh_pb2.LayerPlacement]) -> None:
        changed = []
        for placement in wanted:
            current = self._actual.layer_placement(placement.layer)
            assert current is not None, "every MoE layer has a placement in a view"
            if current.version != placement.version:
                changed.append(
                    f"layer {placement.layer} has version {current.version}, the placement replaces {placement.version}"
                )
        if changed:
            raise RefusedError(grpc.StatusCode.ABORTED, "; ".join(changed))

    def _why_busy(self) -> str:
        running = ", ".join(str(migration.layer) for migration in self._migrations)
        what = f"a migration of layer {running} runs" if running else "another placement is being applied"
        return f"{what}: wait for it, and in mode online switch to static first"

    def _accept(self, placement: mesh_pb2.LayerPlacement) -> mesh_pb2.LayerPlacement:
        current = self._actual.layer_placement(placement.layer)
        assert current is not None
        if list(current.slots) == list(placement.slots):
            return current
        self._queue.append(placement)
        self._view_number = self._actual.view.number
        ledger = self._actual.ledger
        accepted = mesh_pb2.LayerPlacement.FromString(placement.SerializeToString())
        accepted.version = ledger.next_version(placement.layer, current.version, changes=True)
        return accepted


def _invalid(message: str) -> RefusedError:
    return RefusedError(grpc.StatusCode.INVALID_ARGUMENT, message)
