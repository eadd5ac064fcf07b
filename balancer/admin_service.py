"""The balancer's admin service: questions and orders come in here, nothing is decided here."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from expertmesh.balancer.actual import LIVE, Actual, Phase
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.placement_admin import PlacementAdmin
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.scaling_admin import ScaleAdmin
from expertmesh.balancer.views import slot_servers
from expertmesh.v1 import admin_pb2, admin_pb2_grpc


@contextlib.asynccontextmanager
async def _refusing(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """A call of an administrator: what is refused ends it with its status."""
    try:
        yield
    except RefusedError as refused:
        await context.abort(refused.code, refused.message)


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    def __init__(
        self,
        actual: Actual,
        events: EventLog,
        placement: PlacementAdmin,
        scaling: ScaleAdmin,
        routing: RoutingDesk,
        clock: Callable[[], float],
        page: str = "",
    ) -> None:
        self._page = page
        self._actual = actual
        self._routing = routing
        self._events = events
        self._placement = placement
        self._scaling = scaling
        self._clock = clock
        self._started_s = clock()

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: object) -> admin_pb2.GetStatusResponse:
        actual, now = self._actual, self._clock()
        is_live = actual.phase in LIVE
        rank_of = {rank.server_id: rank.rank for rank in actual.view.ranks}
        status = admin_pb2.GetStatusResponse(
            mesh_id=actual.mesh_id,
            view_number=actual.view.number if is_live else 0,
            serving=actual.phase is Phase.SERVING,
            reason=actual.why_not_serving(),
            model=actual.model,
            num_slots=sum(m.registration.num_slots for m in actual.members.ranks() if m.has_experts),
            uptime_s=now - self._started_s,
            page=self._page,
        )
        for member in actual.members:
            registration = member.registration
            server = status.servers.add(
                server_id=member.server_id,
                incarnation=member.incarnation,
                role=registration.role,
                state=actual.state_of(member),
                pid=registration.pid,
                address=registration.grpc_address,
                node=registration.node,
                num_slots=registration.num_slots,
                last_heartbeat_s=max(0.0, now - member.last_seen_s),
                load=member.load,
            )
            if is_live and actual.is_in_view(member):
                server.rank = rank_of[member.server_id]
        self._placement.describe(status)
        self._scaling.describe(status)
        return status

    async def GetPlacement(
        self,
        request: admin_pb2.GetPlacementRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetPlacementRequest, Awaitable[admin_pb2.GetPlacementResponse]],
    ) -> admin_pb2.GetPlacementResponse:
        if self._actual.phase not in LIVE:
            return admin_pb2.GetPlacementResponse()
        view = self._actual.view
        layers = {layer.layer: layer for layer in view.placement}
        unknown = sorted(set(request.layers) - layers.keys())
        if unknown:
            text = f"layers: {unknown} are no MoE layers of this model; it has {sorted(layers)}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return admin_pb2.GetPlacementResponse(
            view_number=view.number,
            layers=[layers[layer] for layer in sorted(set(request.layers) or layers)],
            slot_servers=slot_servers(view),
        )

    async def ListEvents(
        self, request: admin_pb2.ListEventsRequest, context: object
    ) -> AsyncIterator[admin_pb2.ListEventsResponse]:
        past = self._events.after(request.after, request.limit)
        seen = max(request.after, self._events.last_number)
        while True:
            for event in past:
                seen = max(seen, event.number)
                yield admin_pb2.ListEventsResponse(
                    number=event.number,
                    unix_s=event.unix_s,
                    kind=event.kind,
                    subject=event.subject,
                    message=event.message,
                )
            if not request.follow:
                return
            await self._events.wait_beyond(seen)
            past = self._events.after(seen)

    async def GetPlan(
        self,
        request: admin_pb2.GetPlanRequest,
        context: grpc.aio.ServicerContext[admin_pb2.GetPlanRequest, Awaitable[admin_pb2.GetPlanResponse]],
    ) -> admin_pb2.GetPlanResponse:
        async with _refusing(context):
            return await self._placement.plan(request)

    async def Apply(
        self,
        request: admin_pb2.ApplyRequest,
        context: grpc.aio.ServicerContext[admin_pb2.ApplyRequest, Awaitable[admin_pb2.ApplyResponse]],
    ) -> admin_pb2.ApplyResponse:
        async with _refusing(context):
            return self._placement.apply(request)

    async def SetMode(
        self,
        request: admin_pb2.SetModeRequest,
        context: grpc.aio.ServicerContext[admin_pb2.SetModeRequest, Awaitable[admin_pb2.SetModeResponse]],
    ) -> admin_pb2.SetModeResponse:
        async with _refusing(context):
            return self._placement.set_mode(request)

    async def Drain(
        self,
        request: admin_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[admin_pb2.DrainRequest, Awaitable[admin_pb2.DrainResponse]],
    ) -> admin_pb2.DrainResponse:
        async with _refusing(context):
            return self._scaling.drain(request)

    async def SetScale(
        self,
        request: admin_pb2.SetScaleRequest,
        context: grpc.aio.ServicerContext[admin_pb2.SetScaleRequest, Awaitable[admin_pb2.SetScaleResponse]],
    ) -> admin_pb2.SetScaleResponse:
        async with _refusing(context):
            return self._scaling.set(request)

    async def WatchScale(
        self, request: admin_pb2.WatchScaleRequest, context: object
    ) -> AsyncIterator[admin_pb2.WatchScaleResponse]:
        async with contextlib.aclosing(self._scaling.watch(request.launcher)) as scales:
            async for scale in scales:
                yield admin_pb2.WatchScaleResponse(scale=scale)

    async def GetLoads(self, request: admin_pb2.GetLoadsRequest, context: object) -> admin_pb2.GetLoadsResponse:
        return self._routing.loads()

    async def GetCoactivation(
        self,
        request: admin_pb2.GetCoactivationRequest,
        context: grpc.aio.ServicerContext[
            admin_pb2.GetCoactivationRequest, Awaitable[admin_pb2.GetCoactivationResponse]
        ],
    ) -> admin_pb2.GetCoactivationResponse:
        try:
            return self._routing.coactivation(request.layer)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def Record(
        self,
        request: admin_pb2.RecordRequest,
        context: grpc.aio.ServicerContext[admin_pb2.RecordRequest, AsyncIterator[admin_pb2.RecordResponse]],
    ) -> AsyncIterator[admin_pb2.RecordResponse]:
        async with _refusing(context), contextlib.aclosing(self._routing.record(request)) as parts:
            async for part in parts:
                yield part
