"""The launcher's stream from the balancer, on a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import grpc
import pytest

from expertmesh.cli.scale_watch import ScaleWatch
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2

TIMES = 10


METHOD = "/expertmesh.v1.AdminService/WatchScale"


class Watched(grpc.GenericRpcHandler):
    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        return grpc.unary_stream_rpc_method_handler(self._watch) if call.method == METHOD else None

    async def _watch(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        yield admin_pb2.WatchScaleResponse(scale=admin_pb2.Scale(version=1)).SerializeToString()
        await asyncio.Event().wait()  # until the call is cancelled


async def test_a_watch_that_stops_leaves_no_event_to_its_closed_loop(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Watched(),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        for _ in range(TIMES):
            heard = threading.Event()
            watch = ScaleWatch(lambda: address, TlsConfig(), "test", lambda scale, heard=heard: heard.set())  # type: ignore[misc]  # a default binds the loop's variable
            watch.start()
            assert await asyncio.to_thread(heard.wait, 30)
            await asyncio.to_thread(watch.stop)
    finally:
        await server.stop(0)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
