"""A gRPC server whose handlers end in every way there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.rpc import RpcServer, start_server
from expertmesh.mesh.telemetry import Telemetry, disabled_telemetry

NO_TLS = TlsConfig()
SERVICE = "test.Service"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

Context = grpc.aio.ServicerContext[bytes, bytes]


class Behaviours:
    """One method for each way in which a handler can end. ``entered`` is set when ``hang`` runs."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()

    async def echo(self, request: bytes, context: Context) -> bytes:
        return request

    async def crash(self, request: bytes, context: Context) -> bytes:
        raise RuntimeError("secret detail")

    async def refuse(self, request: bytes, context: Context) -> bytes:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "set x to 1")
        raise AssertionError

    async def hang(self, request: bytes, context: Context) -> bytes:
        self.entered.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return b""

    async def stream_echo(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def stream_crash(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"first"
        raise RuntimeError("secret detail")

    async def stream_hang(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def stream_flood(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            while True:
                yield bytes(1 << 16)
        finally:
            self.closed.set()
            raise RuntimeError("the clean-up failed")

    async def write_echo(self, request: bytes, context: Context) -> None:
        await context.write(request)
        await context.write(request)

    async def sum_requests(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        return b"".join([request async for request in requests])

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "Echo": unary(self.echo),
            "Crash": unary(self.crash),
            "Refuse": unary(self.refuse),
            "Hang": unary(self.hang),
            "StreamEcho": grpc.stream_stream_rpc_method_handler(self.stream_echo),
            "StreamCrash": stream(self.stream_crash),
            "StreamHang": stream(self.stream_hang),
            "StreamFlood": stream(self.stream_flood),
            "WriteEcho": stream(self.write_echo),
            "SumRequests": grpc.stream_unary_rpc_method_handler(self.sum_requests),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        return (SERVICE,)


@asynccontextmanager
async def running(
    behaviours: Behaviours | None = None,
    *,
    tls: TlsConfig = NO_TLS,
    telemetry: Telemetry | None = None,
    **options: Any,
) -> AsyncIterator[RpcServer]:
    register: Callable[[grpc.aio.Server], Sequence[str]] = (behaviours or Behaviours()).register
    server = await start_server(
        **{"host": "127.0.0.1", "port": 0, **options},
        tls=tls,
        register=register,
        telemetry=telemetry or disabled_telemetry(),
    )
    try:
        yield server
    finally:
        await server.stop(0)


def calling(kind: Callable[[str], Any], method: str) -> Any:
    """A method of raw bytes, which the types of grpc.aio cannot express."""
    return kind(f"/{SERVICE}/{method}")


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    response = await health_pb2_grpc.HealthStub(channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=10
    )
    return int(response.status)


async def failure(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""
