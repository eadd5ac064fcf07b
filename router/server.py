"""A router process: gRPC server, membership, links; from start to a clean end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.gate import Gate
from expertmesh.mesh.http_server import HttpServer
from expertmesh.mesh.membership import MembershipClient
from expertmesh.mesh.telemetry import Telemetry
from expertmesh.router.calls import Calls
from expertmesh.router.following import FollowedMesh
from expertmesh.router.http.server import make_http_server
from expertmesh.router.model import RouterModel, load_router_model
from expertmesh.router.prefill import PrefillMesh
from expertmesh.router.runner import Runner
from expertmesh.router.service import GenerationService
from expertmesh.router.slo import Objectives
from expertmesh.router.spans import RequestObserver, TokenGaps
from expertmesh.v1 import attention_pb2, mesh_pb2

if TYPE_CHECKING:
    from expertmesh.router.vllm_service import VllmEngineService

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 30.0
_STOP_GRACE_S = 1.0
_DRAINING = "the router stops; send the request to another one"
_LEAVE_TIMEOUT_S = 0.5
# What a request holds beside its prompt: stop strings, logit_bias.
_ENVELOPE_BYTES = 256 * 2**10


class Ready(Protocol):
    """Is told where a router listens; ``http``: None where it has no such door."""

    def __call__(self, address: str, *, http: str | None) -> None: ...


class Router:
    """Everything of one router, made but not yet connected.

    Args:
        share_ports: other routers listen at the same ports.

    Raises:
        UserError: no balancer address, or the checkpoint folder cannot be used.
    """

    def __init__(self, config: MeshConfig, server_id: str, telemetry: Telemetry, *, share_ports: bool = False) -> None:
        self.config = config
        self._share_ports = share_ports
        self.server_id = server_id
        self.telemetry = telemetry
        self.model: RouterModel = load_router_model(config.model, mtp=config.speculation.method == "mtp")
        hello = attention_pb2.LinkHello(
            router_id=server_id, fingerprint=self.model.spec.fingerprint, takes_columns=True
        )
        self._mesh = FollowedMesh(
            _balancer_address(config),
            config,
            hello,
            self._describe,
            on_change=self._on_capacity_change,
            complete=self._complete_heartbeat,
            on_drain=self._on_drain,
        )
        self.pool = self._mesh.pool
        self.prefill: PrefillMesh | None = None
        if config.disaggregation.role == "decode":
            self.prefill = PrefillMesh(config, hello, self._describe)
        self.runner = Runner(config.router, self.model, self.pool, self.prefill)
        settings = config.telemetry
        self.observer = RequestObserver(
            telemetry=telemetry,
            model=self.model.limits.name,
            objectives=Objectives(telemetry.metrics, ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s),
            gaps=TokenGaps(telemetry.metrics.inter_token_latency_seconds.labels()),
        )
        self.calls = Calls(self.runner, self.model, self.observer)
        self.service = GenerationService(self.calls)
        self.vllm_service = _vllm_service(self) if config.router.vllm_grpc else None
        self.gate = Gate(config.door_tls, config.api, server_id)
        self.drain_asked = asyncio.Event()
        self._server: rpc.RpcServer | None = None
        self._http: HttpServer | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen; returns ``host:port``."""
        router = self.config.router
        self.config.check_doors()
        self._server = await rpc.start_server(
            host=router.host,
            port=router.port,
            share_port=self._share_ports,
            tls=self.config.door_tls,
            register=self._register,
            telemetry=self.telemetry,
            key="router.port",
            max_message_bytes=max(router.max_message_bytes, router.max_prompt_bytes + _ENVELOPE_BYTES),
            # Above what is admitted, so that a client hears of RESOURCE_EXHAUSTED instead of waiting for a stream.
            max_concurrent_streams=2 * router.max_queued_requests,
            gate=self.gate,
        )
        if router.http.enabled:
            self._http = make_http_server(
                self.config,
                self.calls,
                self.gate,
                self.telemetry,
                self.why_not_serving,
                share_port=self._share_ports,
            )
            await self._http.start()
        return self._server.address

    def _register(self, server: grpc.aio.Server) -> Sequence[str]:
        names = self.service.register(server)
        return names if self.vllm_service is None else (*names, *self.vllm_service.register(server))

    @property
    def http_address(self) -> str | None:
        """``host:port``, where there is one."""
        return self._http.address if self._http is not None else None

    @property
    def memberships(self) -> list[MembershipClient]:
        """In the own mesh, and in the one that computes prompts."""
        return [self._mesh.membership, *([] if self.prefill is None else [self.prefill.membership])]

    async def drain(self) -> None:
        """Refuse what is new, let what runs finish, for ``DRAIN_TIMEOUT_S`` at most."""
        assert self._server is not None
        self._server.set_serving(False)
        if self._share_ports:
            self._leaving = asyncio.create_task(self._leave_door(), name="leave-door")
            await asyncio.sleep(0)  # it has begun: what was handed to us before is not refused
        self.runner.admission.close(_DRAINING)
        try:
            await self.runner.admission.wait_empty(DRAIN_TIMEOUT_S)
        except TimeoutError:
            log.warning("%d requests still run after %.0f s", len(self.runner.admission), DRAIN_TIMEOUT_S)
        for membership in self.memberships:
            membership.send(mesh_pb2.JoinRequest(leaving=mesh_pb2.Leaving(reason="stopping")))
            await membership.flush(_LEAVE_TIMEOUT_S)

    async def _leave_door(self) -> None:
        """Others stand at it: clients that connect come to them, and those that are connected are asked to do so."""
        assert self._server is not None
        if self._http is not None:
            self._http.stop_listening()
        await self._server.stop(DRAIN_TIMEOUT_S)

    async def close(self) -> None:
        async with asyncio.TaskGroup() as stopping:
            if self._server is not None:
                stopping.create_task(self._server.stop(_STOP_GRACE_S))
            if self._http is not None:
                stopping.create_task(self._http.stop())
        if self._leaving is not None:
            await self._leaving
        await self.pool.close()
        if self.prefill is not None:
            await self.prefill.pool.close()
        await self.runner.constraints.close()
        await self.model.tokenizer.close()

    def _on_capacity_change(self) -> None:
        if self._server is not None:
            self._server.set_serving(self.pool.any_serving and not self.runner.admission.closed)

    def why_not_serving(self) -> str:
        """'' while it serves."""
        if self.runner.admission.closed:
            return _DRAINING
        return "" if self.pool.any_serving else self.pool.why_not_serving()

    def _describe(self) -> mesh_pb2.Registration:
        assert self._server is not None
        return mesh_pb2.Registration(
            server_id=self.server_id,
            role=mesh_pb2.ROLE_ROUTER,
            node=self.config.node,
            pid=os.getpid(),
            grpc_address=self._server.address,
            fingerprint=self.model.spec.fingerprint,
            model=self.model.shape(),
        )

    def _complete_heartbeat(self, heartbeat: mesh_pb2.Heartbeat) -> None:
        if self.runner.admission.closed:
            heartbeat.state = mesh_pb2.SERVER_STATE_DRAINING
        totals = self.observer.totals
        load = mesh_pb2.ServerLoad(
            num_requests_running=len(self.runner.admission),
            num_requests_waiting=self.pool.num_unplaced,
            ttft_s=totals.take_ttft_s(),
            requests_ended=totals.ended,
            requests_failed=totals.failed,
        )
        heartbeat.load.CopyFrom(load)

    def _on_drain(self, reason: str) -> None:
        log.info("asked to drain: %s", reason)
        self.drain_asked.set()


async def serve(
    config: MeshConfig,
    *,
    server_id: str,
    stop: asyncio.Event,
    ready: Ready,
    telemetry: Telemetry,
    share_ports: bool = False,
) -> None:
    """Run a router until ``stop`` is set or the balancer asks it to drain; then drain and return.

    Args:
        ready: called once when the server listens; its health says when it can serve.
        share_ports: other routers of this user listen at the same ports, which are not 0.

    Raises:
        UserError: the configuration or the checkpoint cannot be used, or the port is taken.
    """
    router = Router(config, server_id, telemetry, share_ports=share_ports)
    async with router.gate.open():
        await _serve(router, stop, ready)


async def _serve(router: Router, stop: asyncio.Event, ready: Ready) -> None:
    tasks: list[asyncio.Task[object]] = []
    try:
        ready(await router.start(), http=router.http_address)
        memberships = [asyncio.create_task(each.run(), name="membership") for each in router.memberships]
        stopping = asyncio.create_task(stop.wait(), name="router-stop")
        draining = asyncio.create_task(router.drain_asked.wait(), name="router-drain")
        tasks = [*memberships, stopping, draining]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for membership in memberships:
            if membership.done():
                membership.result()
        await router.drain()
    finally:
        await router.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _vllm_service(router: Router) -> VllmEngineService:
    from expertmesh.router.vllm_service import VllmEngineService

    return VllmEngineService(router.calls, router.pool, router.why_not_serving)


def _balancer_address(config: MeshConfig) -> str:
    balancer = config.balancer
    if balancer.address is not None:
        return balancer.address
    if balancer.port == 0:
        raise UserError(
            "balancer.address", "is unset and balancer.port is 0", "set one of them, or use `expertmesh up`"
        )
    return rpc.join_host_port(balancer.host, balancer.port)
