"""A router in this process, between scripted attention servers and a scripted balancer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import TlsConfig, parse_config
from expertmesh.mesh.telemetry import Telemetry, disabled_telemetry
from expertmesh.router import serve
from expertmesh.v1 import generate_pb2
from support.fake_attention import FakeAttention, FakeBalancer

TIMEOUT_S = 60.0
PROMPT = [5, 6, 7, 8]


def ask(
    max_tokens: int = 8, seed: int = 1, prompt: str | Sequence[int] = PROMPT, **more: Any
) -> generate_pb2.GenerateRequest:
    return build_request(prompt, max_tokens=max_tokens, seed=seed, **more)


class Stand:
    """``start`` gives a client; keywords are keys of the configuration's router section."""

    def __init__(self, telemetry: Telemetry | None = None) -> None:
        self.telemetry = telemetry or disabled_telemetry()
        self.balancer = FakeBalancer()
        self.servers: list[FakeAttention] = []
        self.stop = asyncio.Event()
        self.address = ""
        self.http: str | None = None
        self.sections: dict[str, Any] = {}
        """Further ones of the configuration."""
        self.task: asyncio.Task[None] | None = None
        self.clients: list[GenerateClient] = []

    async def start(self, servers: Sequence[FakeAttention], **router: Any) -> GenerateClient:
        await self.balancer.start()
        for server in servers:
            self.servers.append(await server.start())
        if servers:
            self.balancer.publish(servers)
        client = await self._start_router(router)
        if servers:
            await self.until_serving(True)
        return client

    async def _start_router(self, settings: dict[str, Any]) -> GenerateClient:
        balancer = {"address": self.balancer.address}
        config = parse_config({"router": settings, "balancer": balancer, **self.sections})
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def ready(address: str, *, http: str | None) -> None:
            self.http = http
            listening.set_result(address)

        self.task = asyncio.create_task(
            serve(
                config,
                server_id="router-0",
                stop=self.stop,
                ready=ready,
                telemetry=self.telemetry,
            )
        )
        async with asyncio.timeout(TIMEOUT_S):
            self.address = await listening
        return self.client()

    def client(self) -> GenerateClient:
        self.clients.append(GenerateClient(self.address))
        return self.clients[-1]

    async def until_serving(self, serving: bool) -> None:
        wanted = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        async with asyncio.timeout(TIMEOUT_S), rpc.open_channel(self.address, TlsConfig()) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            async for response in watch:
                if response.status == wanted:
                    watch.cancel()
                    return

    async def close(self) -> None:
        self.stop.set()
        for client in self.clients:
            await client.close()
        for server in self.servers:
            await server.stop()
        if self.task is not None:
            async with asyncio.timeout(TIMEOUT_S):
                await self.task
        await self.balancer.stop()


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Stand]:
    running = Stand()
    yield running
    await running.close()
