"""A rank process: membership on the event loop, the step loop on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.dataplane import check_secure
from expertmesh.mesh.device import CPU
from expertmesh.mesh.framing import Waker
from expertmesh.mesh.halves import AttentionHalf, ExpertHalf
from expertmesh.mesh.inbox import Inbox
from expertmesh.mesh.meet import bind_listener
from expertmesh.mesh.membership import MembershipClient
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.rank_security import rank_security
from expertmesh.mesh.reporting import RoutingReporter
from expertmesh.mesh.stepthread import StepThread
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.mesh.viewopening import RankParts
from expertmesh.mesh.weight_reads import WeightTransport
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

# How long a leaving rank waits for a view without it. Longer than a view change takes, short enough for a mesh that
# stops as a whole, where nobody is left to publish one.
_LEAVE_TIMEOUT_S = 2.0
# A view ends in good order within a step once its ranks know the next one. One that lasts longer hangs on a peer.
_SUPERSEDED_GRACE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class RankIdentity:
    """Who a rank is in the mesh. A fenced rank comes back under a new incarnation."""

    server_id: str
    role: mesh_pb2.Role.ValueType
    node: str
    grpc_address: str
    incarnation: str = field(default_factory=lambda: uuid.uuid4().hex)


class RankServer:
    """Joins the mesh as one rank and steps in its views until told to stop.

    Args:
        attention, experts: the halves of this rank; at least one.
        grpc_address: where this process serves gRPC (health, the router link).
        load: of the attention half, for the heartbeats.

    Raises:
        UserError: the port cannot be had, or ``dataplane.tls`` or ``balancer.migration_transport`` ask for what there
            is not.
    """

    def __init__(
        self,
        config: MeshConfig,
        *,
        role: mesh_pb2.Role.ValueType,
        server_id: str,
        node: str,
        spec: ModelSpec,
        attention: AttentionHalf | None,
        experts: ExpertHalf | None,
        telemetry: Telemetry,
        grpc_address: str,
        load: Callable[[], mesh_pb2.ServerLoad] | None = None,
        device: torch.device = CPU,
    ) -> None:
        assert config.balancer.address is not None, "a rank is started with its balancer's address"
        self._identity = RankIdentity(server_id=server_id, role=role, node=node, grpc_address=grpc_address)
        self._spec = spec
        self._load = load
        self._num_slots = experts.num_slots if experts is not None else 0
        security = rank_security(config.dataplane, config.tls)
        if security is not None:
            check_secure(config.dataplane, device)
            log.info("links to other ranks use TLS")
        self._listener = bind_listener(config.dataplane.interface_host, config.dataplane.port)
        self._weights = WeightTransport(config, experts, device, encrypts=security is not None)
        self._waker = Waker()
        self._inbox = Inbox(self._waker)
        self._reporter = _reporter_of(config, spec) if attention is not None else None
        parts = RankParts(
            config=config,
            spec=spec,
            attention=attention,
            experts=experts,
            observer=self._reporter.observer if self._reporter is not None else None,
            telemetry=telemetry,
            listener=self._listener,
            waker=self._waker,
            inbox=self._inbox,
            report=self._report_from_thread,
            device=device,
            security=security,
            weights=self._weights,
        )
        self._thread = StepThread(parts, view_ended=self._view_ended_from_thread)
        if attention is not None:
            attention.set_waker(self._waker.wake)
        self._on_gpu = device.type == "cuda"
        self._client = MembershipClient(
            config.balancer.address,
            self._registration,
            self._on_message,
            config.tls,
            self._heartbeat,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_asked = asyncio.Event()
        self._leave_changed = asyncio.Event()
        self._paused = False
        self._leaving = False

    @property
    def drain_asked(self) -> asyncio.Event:
        """Set when the balancer asks this rank to leave."""
        return self._drain_asked

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop`` is set, then leave the mesh in good order.

        Raises:
            Exception: whatever ended the step thread; a broken view does not.
        """
        self._loop = asyncio.get_running_loop()
        ended = self._loop.create_future()
        thread = threading.Thread(target=self._run_thread, args=(ended,), name="step", daemon=True)
        thread.start()
        membership = asyncio.create_task(self._stay_registered(), name="membership")
        stopping = asyncio.create_task(stop.wait(), name="rank-stop")
        try:
            await asyncio.wait({ended, membership, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done() and not ended.done() and not membership.done():
                await self._leave()
            self._inbox.close()
            async with asyncio.timeout(_LEAVE_TIMEOUT_S + self._thread.longest_wait_s):
                await asyncio.shield(ended)
            # Not where the step thread failed: with the device gone it might take this process along.
            await asyncio.to_thread(self._weights.close)
            if membership.done():
                membership.result()
        finally:
            self._inbox.close()
            for task in (membership, stopping):
                task.cancel()
            await asyncio.gather(membership, stopping, return_exceptions=True)
            self._listener.close()

    async def _stay_registered(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._client.run(), name="membership-client")
            if self._reporter is not None:
                group.create_task(self._reporter.run(self._client), name="routing-reporter")

    def _run_thread(self, ended: asyncio.Future[None]) -> None:
        assert self._loop is not None
        error: BaseException | None = None
        try:
            self._thread.run()
        except BaseException as caught:  # noqa: BLE001 - handed over to the event loop, which raises it
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody is left to be told
            self._loop.call_soon_threadsafe(_resolve, ended, error)

    async def _leave(self) -> None:
        """Tell the balancer, go on stepping until a view without this rank has begun."""
        self._leaving = True
        self._client.send(mesh_pb2.JoinRequest(leaving=mesh_pb2.Leaving(reason="stopping")))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                # Without the balancer, or when no view can follow, there is nothing to wait for.
                while self._client.connected and self._thread.view is not None and not self._paused:
                    await self._leave_changed.wait()
                    self._leave_changed.clear()

    # -- membership ---------------------------------------------------------------------------------------------

    def _registration(self) -> mesh_pb2.Registration:
        identity, spec, view = self._identity, self._spec, self._thread.view
        registration = mesh_pb2.Registration(
            server_id=identity.server_id,
            incarnation=identity.incarnation,
            role=identity.role,
            node=identity.node,
            pid=os.getpid(),
            grpc_address=identity.grpc_address,
            rank_address=_address_of(self._listener),
            num_slots=self._num_slots,
            highest_view_number=self._inbox.known_view,
            fingerprint=spec.fingerprint,
            on_gpu=self._on_gpu,
            model=mesh_pb2.ModelShape(
                name=spec.name,
                family=spec.family,
                num_experts=spec.num_experts,
                moe_layers=spec.moe_layers,
                bytes_per_expert=spec.bytes_per_expert,
            ),
        )
        if view is not None:
            registration.view_number = view.number
            registration.view_secret = view.proto.secret
            registration.view.CopyFrom(view.proto)
        return registration

    def _heartbeat(self) -> mesh_pb2.Heartbeat:
        view = self._thread.view
        return mesh_pb2.Heartbeat(
            view_number=view.number if view is not None else 0,
            step=self._thread.progress.step,
            state=mesh_pb2.SERVER_STATE_DRAINING if self._leaving else self._thread.state,
            load=self._load() if self._load is not None else None,
        )

    def _view_ended_from_thread(self) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has gone: nobody is left to be told
            self._loop.call_soon_threadsafe(self._leave_changed.set)

    def _report_from_thread(self, message: mesh_pb2.JoinRequest) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has gone, and with it the connection
            self._loop.call_soon_threadsafe(self._client.send, message)

    def _on_message(self, message: mesh_pb2.JoinResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "view":
            self._paused = False
            self._inbox.put_view(message.view, self._identity.server_id, self._identity.incarnation)
            assert self._loop is not None
            self._loop.call_later(_SUPERSEDED_GRACE_S, self._thread.abandon, message.view.number)
        elif kind == "pause":
            self._paused = True
            self._leave_changed.set()
            self._inbox.put_pause(message.pause.reason)
        elif kind == "fenced":
            log.warning("fenced by the balancer: %s; coming back as a new server", message.fenced.reason)
            identity = self._identity
            self._identity = RankIdentity(
                server_id=identity.server_id,
                role=identity.role,
                node=identity.node,
                grpc_address=identity.grpc_address,
            )
            self._inbox.fence(message.fenced.reason)
        elif kind in ("plan", "commit", "abort"):
            self._thread.hear(message)
        elif kind == "record":
            if self._reporter is not None:
                self._reporter.control(message.record)
        elif kind == "drain":
            log.info("asked to drain: %s", message.drain.reason)
            self._drain_asked.set()


def _reporter_of(config: MeshConfig, spec: ModelSpec) -> RoutingReporter:
    return RoutingReporter(
        spec.moe_layers,
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        interval_s=config.balancer.stats_interval_s,
    )


def _resolve(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
