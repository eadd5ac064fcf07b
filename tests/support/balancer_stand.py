"""The balancer with its real gRPC server, store and state file; servers are raw streams."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc

from expertmesh.balancer import serve
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2, mesh_pb2_grpc
from support.balancer_parts import registration

TIMEOUT_S = 45.0
LEASE_S = 60.0  # these servers send no heartbeats


def config(state_dir: Path, **balancer: Any) -> MeshConfig:
    settings = {"state_dir": str(state_dir), "heartbeat_s": 0.1, "lease_s": LEASE_S, **balancer}
    return parse_config({"attention": {"servers": 1}, "expert": {"servers": 2}, "balancer": settings})


@contextlib.asynccontextmanager
async def balancer(config: MeshConfig, server_id: str = "balancer") -> AsyncIterator[str]:
    stop, address = asyncio.Event(), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(config, server_id=server_id, stop=stop, ready=address.set_result, telemetry=disabled_telemetry())
    )
    try:
        await asyncio.wait({serving, address}, return_when=asyncio.FIRST_COMPLETED, timeout=TIMEOUT_S)
        if serving.done():
            await serving
        yield address.result()
    finally:
        stop.set()
        await asyncio.wait_for(serving, TIMEOUT_S)


class Stream:
    """One server's side of Join."""

    def __init__(self, channel: grpc.aio.Channel, made: mesh_pb2.Registration) -> None:
        self.registration = made
        self._call = mesh_pb2_grpc.MembershipServiceStub(channel).Join()
        self.views: list[mesh_pb2.View] = []

    async def register(self) -> None:
        await self.say(registration=self.registration)
        assert (await self.next("welcome")).lease_s == LEASE_S

    async def say(self, **message: Any) -> None:
        await self._call.write(mesh_pb2.JoinRequest(**message))

    async def next_message(self) -> mesh_pb2.JoinResponse | None:
        """None at the end of the stream."""
        message = await self._call.read()
        return message if isinstance(message, mesh_pb2.JoinResponse) else None

    async def next(self, kind: str) -> Any:
        """The next message of a kind; others are skipped."""
        async with asyncio.timeout(TIMEOUT_S):
            while (message := await self.next_message()) is not None:
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)
        raise EOFError(f"{await self._call.code()}: {await self._call.details()}")

    async def next_view(self) -> mesh_pb2.View:
        view: mesh_pb2.View = await self.next("view")
        self.views.append(view)
        if any(rank.incarnation == self.registration.incarnation for rank in view.ranks):
            await self.say(view_ready=mesh_pb2.ViewReady(view_number=view.number))
        return view

    async def ended(self) -> tuple[grpc.StatusCode, str]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self._call.code(), await self._call.details()

    def cut(self) -> None:
        self._call.cancel()


async def join(channel: grpc.aio.Channel, *server_ids: str, **fields: Any) -> dict[str, Stream]:
    streams = {server_id: Stream(channel, registration(server_id, **fields)) for server_id in server_ids}
    for stream in streams.values():
        await stream.register()
    return streams


async def wait_serving(
    channel: grpc.aio.Channel, number: int, kind: str = "view_serving"
) -> admin_pb2.GetStatusResponse:
    """Follows the events: no polling."""
    admin = admin_pb2_grpc.AdminServiceStub(channel)
    async with asyncio.timeout(TIMEOUT_S):
        async for event in admin.ListEvents(admin_pb2.ListEventsRequest(follow=True)):
            if event.kind == kind and event.subject == f"view {number}":
                break
    return await admin.GetStatus(admin_pb2.GetStatusRequest())


async def cli(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "expertmesh.cli.main", "balancer", *arguments, stdout=-1, stderr=-1
    )
    out, err = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
