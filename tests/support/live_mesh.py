"""One whole mesh on the demo model that many tests share, with its telemetry in reach.

Tests take it from the fixture ``live`` (tests/integration/conftest.py). A test may damage it: the next one gets it back
when every server has returned, or a new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import psutil

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.v1 import admin_pb2
from support import mesh_state
from support.mesh import mesh_config, start_mesh
from support.otlp_collector import Collector, running_collector

CLIENT_STALL_TIMEOUT_S = 2.0
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
"""With a place for tools; the demo model has none of its own."""
SETTLE_TIMEOUT_S = 60.0
SPAN_DELAY_MS = 500
"""How long spans wait for others before they are exported."""


class LiveMesh:
    """2 attention and 3 expert servers, a router, a balancer; what dies is started again.

    Only requests that bring a sampled trace context are traced, those in every step. /metrics is on everywhere.
    """

    def __init__(self, folder: Path) -> None:
        self._resources = ExitStack()
        self.collector: Collector = self._resources.enter_context(running_collector())
        config = mesh_config(
            router__client_stall_timeout_s=CLIENT_STALL_TIMEOUT_S,
            router__vllm_grpc=True,
            model__chat_template=CHAT_TEMPLATE,
            balancer__page_port=0,
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
    def http(self) -> str:
        """The URL of the OpenAI-compatible API, without /v1."""
        return f"http://{self.mesh.http}"

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
        return mesh_state.metrics(self.mesh, server_id)

    async def status(self) -> admin_pb2.GetStatusResponse:
        return await mesh_state.status(self.mesh)

    async def is_whole(self) -> bool:
        """Whether every process runs and every rank steps in the current view."""
        return await mesh_state.stepping(self.mesh) is not None

    async def until_idle(self, timeout_s: float = SETTLE_TIMEOUT_S) -> None:
        """Until no attention server holds a request or a KV block."""
        await mesh_state.until_idle(self.mesh, timeout_s)


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
