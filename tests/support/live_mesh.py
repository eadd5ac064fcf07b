"""One whole mesh on the demo model that many tests share, with its telemetry in reach.

Tests take it from the fixture ``live`` (tests/integration/conftest.py). A test may damage it: the next one gets it back
when every server has returned, or a new one.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import urllib.request
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import grpc
import psutil
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.mesh import mesh_config, start_mesh
from support.otlp_collector import Collector, running_collector

CLIENT_STALL_TIMEOUT_S = 2.0
SETTLE_TIMEOUT_S = 60.0
SPAN_DELAY_MS = 500
"""How long spans wait for others before they are exported."""
_POLL_S = 0.1


class LiveMesh:
    """2 attention and 3 expert servers, a router, a balancer; what dies is started again.

    Only requests that bring a sampled trace context are traced, those in every step. /metrics is on everywhere.
    """

    def __init__(self, folder: Path) -> None:
        self._resources = ExitStack()
        self.collector: Collector = self._resources.enter_context(running_collector())
        config = mesh_config(
            router__client_stall_timeout_s=CLIENT_STALL_TIMEOUT_S,
            telemetry__metrics_port=0,
            telemetry__otlp_endpoint=self.collector.address,
            telemetry__trace_sample_ratio=0.0,
            telemetry__step_sample_interval_s=0.0,
        )
        try:
            with mock.patch.dict(os.environ, OTEL_BSP_SCHEDULE_DELAY=str(SPAN_DELAY_MS)):
                self.mesh: LocalMesh = start_mesh(folder, config, restart=True)
        except BaseException:
            self._resources.close()
            raise
        self._resources.callback(self.mesh.stop)

    def stop(self) -> None:
        self._resources.close()

    @property
    def router(self) -> str:
        return self.mesh.router

    @property
    def ranks(self) -> list[str]:
        """Ids of the attention and expert servers."""
        return [server.id for server in self.mesh.servers.values() if server.role not in ("router", "balancer")]

    @property
    def attention_servers(self) -> list[str]:
        return [server.id for server in self.mesh.servers.values() if server.role == "attention"]

    @property
    def processes(self) -> list[psutil.Process]:
        """Of every service that runs."""
        return [psutil.Process(server.pid) for server in self.mesh.servers.values() if server.pid is not None]

    def metrics(self, server_id: str) -> dict[str, float]:
        """What a service's /metrics says now, summed over labels."""
        log = (self.mesh.state_dir / f"{server_id}.log").read_text(encoding="utf-8", errors="replace")
        url = re.findall(r"metrics on (http://\S+)", log)[-1]
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return values

    async def status(self) -> admin_pb2.GetStatusResponse:
        async with rpc.open_channel(self.mesh.balancer, TlsConfig()) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10, wait_for_ready=True)

    async def is_whole(self) -> bool:
        """Whether every process runs and every rank steps in the current view."""
        if any(server.pid is None for server in self.mesh.servers.values()):
            return False
        try:
            status = await self.status()
        except grpc.aio.AioRpcError:
            return False
        pids = {server.id: server.pid for server in self.mesh.servers.values()}
        stepping = {
            server.server_id
            for server in status.servers
            if server.HasField("rank")
            and server.state == mesh_pb2.SERVER_STATE_SERVING
            and server.pid == pids.get(server.server_id)
        }
        return status.serving and stepping == set(self.ranks)

    async def until_idle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Until no attention server holds a request or a KV block."""
        held: dict[str, tuple[float, float, float]] = {}

        async def is_idle() -> bool:
            for server_id in self.attention_servers:
                values = await asyncio.to_thread(self.metrics, server_id)
                held[server_id] = (
                    values["vllm:num_requests_running"],
                    values["vllm:num_requests_waiting"],
                    values["vllm:kv_cache_usage_perc"],
                )
            return not any(any(figures) for figures in held.values())

        await until(is_idle, timeout_s, lambda: f"running, waiting, KV usage do not come to 0: {held}")


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float, otherwise: Callable[[], str]) -> None:
    """Ask until ``condition`` holds; fail with ``otherwise()`` when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {otherwise()}"
        await asyncio.sleep(_POLL_S)


class LiveMeshHolder:
    """Starts the shared mesh at its first use."""

    def __init__(self, new_folder: Callable[[], Path]) -> None:
        self._new_folder = new_folder
        self._live: LiveMesh | None = None

    async def get(self) -> LiveMesh:
        if self._live is not None and not await self._live.is_whole():
            self.stop()
        if self._live is None:
            self._live = LiveMesh(self._new_folder())
        return self._live

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = None
