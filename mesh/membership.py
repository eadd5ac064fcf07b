"""A server's side of ``MembershipService.Join``: registers, keeps the lease, hears of views."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import mesh_pb2, mesh_pb2_grpc

log = logging.getLogger(__name__)

_FIRST_RETRY_S = 0.1
# While the channel knows that nobody listens, a call fails without a packet: this and the channel's own pause add up to
# how long a balancer that is back waits for its last rank.
_MAX_RETRY_S = 0.25
_CHANNEL_OPTIONS = (("grpc.max_reconnect_backoff_ms", 500),)
# A balancer that answers nothing to a registration for so long is taken for dead, and called again.
_WELCOME_TIMEOUT_S = 5.0


class MembershipClient:
    """Keeps one server registered with the balancer, for as long as ``run`` runs.

    Everything happens on the event loop; ``on_message`` hears every message after the Welcome, in order.

    Args:
        registration: what to register with; asked again for every connection, since the view may have changed.
        heartbeat: the state to report; asked every heartbeat.
    """

    def __init__(
        self,
        address: str,
        registration: Callable[[], mesh_pb2.Registration],
        on_message: Callable[[mesh_pb2.JoinResponse], None],
        tls: TlsConfig,
        heartbeat: Callable[[], mesh_pb2.Heartbeat] = mesh_pb2.Heartbeat,
    ) -> None:
        self._address = address
        self._registration = registration
        self._on_message = on_message
        self._tls = tls
        self._heartbeat = heartbeat
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
        retry_s = _FIRST_RETRY_S
        failing: grpc.StatusCode | None = None  # said once, however often it is tried
        async with rpc.open_channel(self._address, self._tls, options=_CHANNEL_OPTIONS) as channel:
            stub = mesh_pb2_grpc.MembershipServiceStub(channel)
            while True:
                try:
                    if await self._session(stub):
                        retry_s = _FIRST_RETRY_S
                        failing = None
                except grpc.aio.AioRpcError as error:
                    level = logging.INFO if error.code() == grpc.StatusCode.UNAVAILABLE else logging.WARNING
                    level, failing = logging.DEBUG if error.code() == failing else level, error.code()
                    log.log(level, "balancer %s: %s: %s", self._address, error.code().name, error.details())
                except TimeoutError:
                    log.warning("balancer %s: no answer to the registration", self._address)
                finally:
                    self.connected = False
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _MAX_RETRY_S)

    async def _session(self, stub: mesh_pb2_grpc.MembershipServiceStub) -> bool:
        """One connection, from registration to its end; whether the balancer welcomed us."""
        call = stub.Join()
        try:
            await call.write(mesh_pb2.JoinRequest(registration=self._registration()))
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                first = await call.read()
            if not isinstance(first, mesh_pb2.JoinResponse):  # the stream ended: its status says why
                await self._log_status(call)
                return False
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
        if not call.done():
            return
        code = await call.code()
        if code != grpc.StatusCode.OK:
            details = await call.details()
            log.log(
                logging.INFO if code == grpc.StatusCode.UNAVAILABLE else logging.WARNING,
                "balancer %s ended the registration: %s: %s",
                self._address,
                code.name,
                details,
            )

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
