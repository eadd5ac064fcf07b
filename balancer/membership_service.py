"""The balancer's membership service: the streams of servers come in here, nothing is decided here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable

import grpc

from expertmesh.balancer import door
from expertmesh.balancer.actual import Actual
from expertmesh.balancer.members import ROLE_NAMES
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.mesh.gate import Denied
from expertmesh.mesh.rpc_door import principal
from expertmesh.v1 import mesh_pb2, mesh_pb2_grpc

REGISTRATION_TIMEOUT_S = 5.0

ROUTINE = frozenset({"heartbeat", "stats", "trace", "migration"})
"""Messages that nothing urgent follows from."""

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
