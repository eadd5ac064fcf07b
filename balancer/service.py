"""The balancer's gRPC services: streams and questions come in here, nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from expertmesh.balancer import door
from expertmesh.balancer.actual import LIVE, Actual, Phase
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import ROLE_NAMES
from expertmesh.balancer.placement_admin import PlacementAdmin
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.scaling_admin import ScaleAdmin
from expertmesh.balancer.views import slot_servers
from expertmesh.mesh.gate import Denied
from expertmesh.mesh.rpc_door import principal
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2, mesh_pb2_grpc

REGISTRATION_TIMEOUT_S = 5.0

JoinContext = grpc.aio.ServicerContext[AsyncIterator[mesh_pb2.JoinRequest], AsyncIterator[mesh_pb2.JoinResponse]]


class Sessions:
    """The open streams by number. ``None`` in an outbox ends its stream."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._outboxes: dict[int, asyncio.Queue[mesh_pb2.JoinResponse | None]] = {}

    def open(self) -> tuple[int, asyncio.Queue[mesh_pb2.JoinResponse | None]]:
        session, outbox = next(self._numbers), asyncio.Queue[mesh_pb2.JoinResponse | None]()
        self._outboxes[session] = outbox
        return session, outbox

    def forget(self, session: int) -> None:
        self._outboxes.pop(session, None)

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None:
        if session in self._outboxes:  # else the stream broke this moment
            self._outboxes[session].put_nowait(message)

    def close(self, session: int) -> None:
        if session in self._outboxes:
            self._outboxes[session].put_nowait(None)

    def close_all(self) -> None:
        for session in self._outboxes:
            self.close(session)


@contextlib.asynccontextmanager
async def _refusing(context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
    """A call of an administrator: what is refused ends it with its status."""
    try:
        yield
    except RefusedError as refused:
        await context.abort(refused.code, refused.message)


ROUTINE = frozenset({"heartbeat", "stats", "trace", "migration"})
"""Messages that nothing urgent follows from."""


class MembershipServicer(mesh_pb2_grpc.MembershipServiceServicer):
    """
    Args:
        wake: runs the reconcile loop.
        wake_soon: runs it together with what else comes in a moment.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        actual: Actual,
        sessions: Sessions,
        routing: RoutingDesk,
        wake: Callable[[], None],
        wake_soon: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._actual = actual
        self._routing = routing
        self._sessions = sessions
        self._wake = wake
        self._wake_soon = wake_soon
        self._clock = clock

    async def Join(
        self, request_iterator: AsyncIterator[mesh_pb2.JoinRequest], context: JoinContext
    ) -> AsyncIterator[mesh_pb2.JoinResponse]:
        registration = await self._first(request_iterator, context)
        _check_certificate(registration)
        session, outbox = self._sessions.open()
        reader: asyncio.Task[None] | None = None
        try:
            verdict = self._actual.register(session, registration, self._clock())
            if isinstance(verdict, door.Refused):
                await context.abort(verdict.code, verdict.message)
            self._wake()
            if isinstance(verdict, door.Welcomed):
                name = f"membership-{registration.server_id}"
                reader = asyncio.create_task(self._read(session, request_iterator), name=name)
            while (message := await outbox.get()) is not None:
                yield message
        finally:
            # Before anything that waits: a client that goes away cancels this call at any moment, here too.
            if reader is not None:
                reader.cancel()
            self._sessions.forget(session)
            self._actual.stream_closed(session, self._clock())
            self._wake()
            if reader is not None:
                await asyncio.gather(reader, return_exceptions=True)

    async def _first(
        self, requests: AsyncIterator[mesh_pb2.JoinRequest], context: JoinContext
    ) -> mesh_pb2.Registration:
        try:
            async with asyncio.timeout(REGISTRATION_TIMEOUT_S):
                first = await anext(requests)
        except TimeoutError:
            text = f"no registration within {REGISTRATION_TIMEOUT_S:g} s: send it first"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, text)
        except StopAsyncIteration:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the stream ended without a registration")
        if first.WhichOneof("message") != "registration":
            text = f"the first message is {first.WhichOneof('message')}: send a registration first"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        return first.registration

    async def _read(self, session: int, requests: AsyncIterator[mesh_pb2.JoinRequest]) -> None:
        """Until the server ends its side, or the connection breaks and gRPC cancels the call as a whole."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            async for request in requests:
                self._actual.receive(session, request, self._clock())
                self._routing.receive(session, request)
                if request.WhichOneof("message") in ROUTINE:
                    self._wake_soon()
                else:
                    self._wake()
        self._sessions.close(session)


def _check_certificate(registration: mesh_pb2.Registration) -> None:
    """
    Raises:
        Denied: the caller's certificate is not that of the server that it registers as.
    """
    identity = principal().identity
    if identity is None:  # certificates do not say whose they are
        return
    role = ROLE_NAMES.get(registration.role, "no role")
    problem = identity.why_not(role, registration.server_id)
    if problem:
        text = f"registration of {registration.server_id[:128]!r} as {role}: {problem}"
        raise Denied(grpc.StatusCode.PERMISSION_DENIED, text)


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
