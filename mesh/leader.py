"""Which of a mesh's balancers leads: asked of their health, which only the leader calls SERVING."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig

_POLL_S = 0.05


async def find_leader(addresses: Sequence[str], tls: TlsConfig, timeout_s: float) -> str | None:
    """The address of the one that leads; None when none does within ``timeout_s``. One that is alone is not asked."""
    if len(addresses) == 1:
        return addresses[0]
    asked = [asyncio.create_task(_until_serving(address, tls), name=f"leader {address}") for address in addresses]
    try:
        done, _ = await asyncio.wait(asked, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return next((task.result() for task in done), None)
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def _until_serving(address: str, tls: TlsConfig) -> str:
    async with rpc.open_channel(address, tls, role="balancer") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return address
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
            await asyncio.sleep(_POLL_S)
