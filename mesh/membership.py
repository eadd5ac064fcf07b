"""A server's side of ``MembershipService.Join``: registers, keeps the lease, hears of views."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import mesh_pb2, mesh_pb2_grpc

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
# While the channel knows that nobody listens, a call fails without a packet: this and the channel's own pause add up to
# how long a balancer that is back waits for its last rank.
_MAX_RETRY_S = 0.25
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (("grpc.max_reconnect_backoff_ms", 500),)
# One balancer that hangs may wake up, and there is no other. Of several, another one leads by then.
_OPTIONS_OF_SEVERAL = (*_CHANNEL_OPTIONS, ("grpc.keepalive_time_ms", 1000), ("grpc.http2.ping_timeout_ms", 1500))
# A balancer that answers nothing to a registration for so long is taken for dead, and called again.
_WELCOME_TIMEOUT_S = 5.0
# The same if others may be asked; most of it is for a machine that does not even refuse a connection.
_WELCOME_TIMEOUT_OF_SEVERAL_S = 2.0
_SECRET_BYTES = 16


class MembershipClient:
    """Keeps one server registered with the balancer, for as long as ``run`` runs.

    Everything happens on the event loop; ``on_message`` hears every message after the Welcome, in order.

    Args:
        addresses: ``HOST:PORT,HOST:PORT`` of the balancers, one of which leads; they are asked in turn.
        registration: what to register with; asked again for every connection, since the view may have changed.
        heartbeat: the state to report; asked every heartbeat.
    """

    def __init__(
        self,
        addresses: str,
        registration: Callable[[], mesh_pb2.Registration],
        on_message: Callable[[mesh_pb2.JoinResponse], None],
        tls: TlsConfig,
        heartbeat: Callable[[], mesh_pb2.Heartbeat] = mesh_pb2.Heartbeat,
    ) -> None:
        self._addresses = split_addresses(addresses)
        self._address = self._addresses[0]  # that is being asked
        self._failing: dict[str, grpc.StatusCode] = {}  # how they failed last
        self._welcome_timeout_s = _WELCOME_TIMEOUT_S if len(self._addresses) == 1 else _WELCOME_TIMEOUT_OF_SEVERAL_S
        self._registration = registration
        self._on_message = on_message
        self._tls = tls
        self._heartbeat = heartbeat
        self._incarnation_secret = secrets.token_bytes(_SECRET_BYTES)
        self._outbox: deque[mesh_pb2.JoinRequest] = deque()
        self._outbox_filled = asyncio.Event()
        self.connected = False

    def send(self, message: mesh_pb2.JoinRequest) -> None:
        """Send now, or as soon as the balancer can be reached."""
        self._outbox.append(message)
        self._outbox_filled.set()

    @property
    def is_drained(self) -> bool:
        """Connected, and nothing waits to be sent."""
        return self.connected and not self._outbox

    async def flush(self, timeout_s: float) -> bool:
        """Wait until everything was handed to the connection; False when that took too long."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._outbox:
            if not self.connected or asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def run(self) -> None:
        """Register and stay registered, for ever."""
        while True:
            await self._run_with(rpc.files_stamp(self._tls))

    async def _run_with(self, certificates: rpc.Stamp) -> None:
        """Until a connection has ended and the certificates are other ones."""
        options = _CHANNEL_OPTIONS if len(self._addresses) == 1 else _OPTIONS_OF_SEVERAL
        retry_s, num_failed = _FIRST_RETRY_S, 0
        async with AsyncExitStack() as channels:
            stubs = deque[tuple[str, mesh_pb2_grpc.MembershipServiceStub]]()
            for address in self._addresses:
                channel = rpc.open_channel(address, self._tls, options=options, role="balancer")
                await channels.enter_async_context(channel)
                stubs.append((address, mesh_pb2_grpc.MembershipServiceStub(channel)))
            while rpc.files_stamp(self._tls) == certificates:
                self._address, stub = stubs[0]
                if await self._try(stub):
                    retry_s, num_failed = _FIRST_RETRY_S, 0
                else:
                    num_failed += 1
                stubs.rotate(-1)
                if num_failed % len(stubs) == 0:  # nobody leads: ask all of them again, a bit later
                    await asyncio.sleep(retry_s)
                    retry_s = min(2 * retry_s, _MAX_RETRY_S)

    async def _try(self, stub: mesh_pb2_grpc.MembershipServiceStub) -> bool:
        """One balancer, until its connection ends; whether it welcomed us."""
        try:
            return await self._session(stub)
        except grpc.aio.AioRpcError as error:
            self._tell_failure(error.code(), error.details())
        except TimeoutError:
            log.warning("balancer %s: no answer to the registration", self._address)
        finally:
            self.connected = False
        return False

    async def _session(self, stub: mesh_pb2_grpc.MembershipServiceStub) -> bool:
        """One connection, from registration to its end; whether the balancer welcomed us."""
        call = stub.Join()
        try:
            async with asyncio.timeout(self._welcome_timeout_s):
                registration = self._registration()
                registration.incarnation_secret = self._incarnation_secret
                await call.write(mesh_pb2.JoinRequest(registration=registration))
                first = await call.read()
            if not isinstance(first, mesh_pb2.JoinResponse):  # the stream ended: its status says why
                await self._log_status(call)
                return False
            self._failing.clear()
            welcome = first.welcome
            self.connected = True
            writers = [
                asyncio.create_task(self._write_outbox(call), name="membership-outbox"),
                asyncio.create_task(self._beat(welcome.heartbeat_s), name="membership-heartbeat"),
            ]
            try:
                while isinstance(message := await call.read(), mesh_pb2.JoinResponse):
                    self._on_message(message)
                    if message.WhichOneof("message") == "fenced":
                        break
            finally:
                self.connected = False
                for task in writers:
                    task.cancel()
                await asyncio.gather(*writers, return_exceptions=True)  # they fail as the call does: the reader tells
            await self._log_status(call)
            return True
        finally:
            call.cancel()

    async def _log_status(self, call: grpc.aio.StreamStreamCall[mesh_pb2.JoinRequest, mesh_pb2.JoinResponse]) -> None:
        if call.done() and (code := await call.code()) != grpc.StatusCode.OK:
            self._tell_failure(code, await call.details())

    def _tell_failure(self, code: grpc.StatusCode, details: str | None) -> None:
        """Once, however often it is tried."""
        level = logging.INFO if code == grpc.StatusCode.UNAVAILABLE else logging.WARNING
        if self._failing.get(self._address) == code:
            level = logging.DEBUG
        self._failing[self._address] = code
        log.log(level, "balancer %s: %s: %s", self._address, code.name, details)

    async def _write_outbox(self, call: grpc.aio.StreamStreamCall[mesh_pb2.JoinRequest, mesh_pb2.JoinResponse]) -> None:
        while True:
            while self._outbox:
                await call.write(self._outbox[0])
                self._outbox.popleft()
            self._outbox_filled.clear()
            await self._outbox_filled.wait()

    async def _beat(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            if not any(message.WhichOneof("message") == "heartbeat" for message in self._outbox):
                self.send(mesh_pb2.JoinRequest(heartbeat=self._heartbeat()))
