"""What administrators ask about placements: a plan, its application, the mode. Nothing of gRPC but status codes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import grpc

from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.control import PlacementControl
from expertmesh.balancer.evaluation import EVALUATION_TIMEOUT_S, Answer, EvaluationWorker, Job, LayerQuestion
from expertmesh.balancer.policy import Layout, Proposal
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.transfers import plan_transfers
from expertmesh.balancer.views import slot_servers
from expertmesh.v1 import admin_pb2, mesh_pb2


class PlacementAdmin:
    """
    Args:
        max_loads: slots a layer that a plan within the budget may load.
        wake: runs the reconcile loop soon.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        actual: Actual,
        control: PlacementControl,
        worker: EvaluationWorker,
        *,
        max_loads: int,
        wake: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._actual = actual
        self._control = control
        self._worker = worker
        self._max_loads = max_loads
        self._wake = wake
        self._clock = clock

    async def plan(self, request: admin_pb2.GetPlanRequest) -> admin_pb2.GetPlanResponse:
        """What would change now, whether it beats the noise or not; layers that nothing improves are left out.

        Raises:
            RefusedError: no view serves, a layer is unknown, nothing was counted yet, or the solve takes too long.
        """
        actual = self._actual
        if actual.phase is not Phase.SERVING:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f"nothing is served: {actual.why_not_serving()}")
        job = Job(
            number=0,
            view_number=actual.view.number,
            layout=Layout.of(actual.view),
            max_loads=None if request.full else self._max_loads,
            layers=tuple(self._questions(request)),
        )
        response = admin_pb2.GetPlanResponse(
            view_number=actual.view.number,
            slot_servers=slot_servers(actual.view),
            model=actual.model,
            fingerprint=actual.fingerprint,
        )
        answer = await self._ask(job)
        for asked in job.layers:
            if asked.layer in answer.proposals:
                self._add_change(response, asked, answer.proposals[asked.layer], job.layout)
        return response

    def apply(self, request: admin_pb2.ApplyRequest) -> admin_pb2.ApplyResponse:
        """
        Raises:
            RefusedError: see ``Applying.request``.
        """
        accepted = self._control.applying.request(request)
        self._wake()
        return admin_pb2.ApplyResponse(accepted=accepted)

    def set_mode(self, request: admin_pb2.SetModeRequest) -> admin_pb2.SetModeResponse:
        """
        Raises:
            RefusedError: see ``Online.set_mode``.
        """
        layers = request.layer_updates_per_iter if request.HasField("layer_updates_per_iter") else None
        previous = self._control.online.set_mode(request.mode, layers)
        self._wake()
        return admin_pb2.SetModeResponse(previous=previous)

    def describe(self, status: admin_pb2.GetStatusResponse) -> None:
        """Fill in what the status says about placements and migrations."""
        online, migrations, now = self._control.online, self._control.migrations, self._clock()
        status.balancer_mode = online.mode
        status.layer_updates_per_iter = online.layer_updates_per_iter
        status.fingerprint = self._actual.fingerprint
        status.layers_to_apply = self._control.applying.num_queued
        status.migrations_committed = migrations.num_committed
        status.migrations_aborted = migrations.num_aborted
        for migration in migrations:
            status.migrations.add(
                id=migration.plan.id,
                layer=migration.layer,
                version=migration.plan.placement.version,
                phase=migration.stage,
                phase_s=now - migration.stage_s,
                slots_loaded=migration.num_loads,
                ranks_done=migration.ranks_done,
                num_ranks=len(migration.ranks),
            )

    def _questions(self, request: admin_pb2.GetPlanRequest) -> Iterator[LayerQuestion]:
        own = list(self._actual.model.moe_layers)
        unknown = sorted(set(request.layers) - set(own))
        if unknown:
            text = f"layers: {unknown} are no MoE layers of this model; it has {own}"
            raise RefusedError(grpc.StatusCode.INVALID_ARGUMENT, text)
        asked = [self._control.online.question(layer) for layer in own if not request.layers or layer in request.layers]
        if not any(asked):
            text = "no routing statistics yet: they come with traffic"
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, text)
        yield from (question for question in asked if question is not None)

    async def _ask(self, job: Job) -> Answer:
        try:
            async with asyncio.timeout(EVALUATION_TIMEOUT_S):
                return await self._worker.ask(job)
        except TimeoutError:
            text = f"no plan within {EVALUATION_TIMEOUT_S:g} s: ask for fewer layers"
            raise RefusedError(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None

    def _add_change(
        self, response: admin_pb2.GetPlanResponse, asked: LayerQuestion, proposal: Proposal, layout: Layout
    ) -> None:
        if proposal.slots == asked.slots:  # quotas come with traffic and are nothing to apply
            return
        num_loads = len(plan_transfers(asked.slots, proposal.slots, layout))
        before, after = proposal.before, proposal.after
        response.changes.add(
            placement=mesh_pb2.LayerPlacement(layer=asked.layer, version=asked.version, slots=proposal.slots),
            balancedness_before=before.balancedness,
            balancedness_after=after.balancedness,
            fanout_ranks_before=before.fanout_ranks or 0.0,
            fanout_ranks_after=after.fanout_ranks or 0.0,
            fanout_nodes_before=before.fanout_nodes or 0.0,
            fanout_nodes_after=after.fanout_nodes or 0.0,
            slots_loaded=num_loads,
            bytes=num_loads * self._actual.model.bytes_per_expert,
            gain=proposal.gain,
            noise=proposal.noise,
            worthwhile=proposal.worthwhile,
        )
