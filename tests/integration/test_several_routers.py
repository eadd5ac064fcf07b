"""Two routers behind one address: real processes, a connection a stream."""

from __future__ import annotations

import asyncio
import signal
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support import mesh_state
from support.mesh import REQUEST_TIMEOUT_S, greedy_request, kept_down, mesh_config, start_mesh

pytestmark = pytest.mark.slow

ROUTERS = ("router-0", "router-1")
NUM_STREAMS = 64
"""Each with a connection of its own, which the kernel gives to one router or the other by the hash of its ports: that
one router gets none of so many happens once in 2 ** 63 times."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)
PROMPT = [7, 11, 13]
LONG = 160
"""Tokens of a stream that runs while something happens to a router: seconds, and that takes milliseconds."""
TIMEOUT_S = 60.0


@dataclass
class Stream:
    """What came of one request."""

    token_ids: list[int] = field(default_factory=list)
    finished: bool = False
    error: grpc.StatusCode | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, router: str, max_tokens: int) -> None:
        async with rpc.open_channel(router, TlsConfig(), options=OWN_CONNECTION) as channel:
            stub = generate_pb2_grpc.GenerationServiceStub(channel)
            request = greedy_request(PROMPT, max_tokens, ignore_eos=True)
            try:
                async for message in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                    self.token_ids += message.token_ids
                    self.finished |= message.HasField("finish")
                    self.begun.set()
            except grpc.aio.AioRpcError as error:
                self.error = error.code()
            self.begun.set()


@dataclass
class Streams:
    """Streams that run beside each other; a context manager that ends with them."""

    router: str
    max_tokens: int
    count: int = NUM_STREAMS

    async def __aenter__(self) -> list[Stream]:
        streams = [Stream() for _ in range(self.count)]
        self._tasks = [asyncio.create_task(stream.run(self.router, self.max_tokens)) for stream in streams]
        async with asyncio.timeout(TIMEOUT_S):
            for stream in streams:
                await stream.begun.wait()
        return streams

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    config = mesh_config(
        router__servers=len(ROUTERS), attention__servers=1, expert__servers=1, telemetry__metrics_port=0
    )
    running = start_mesh(tmp_path / "mesh", config, restart=True)
    yield running
    running.stop()


async def ended(mesh: LocalMesh) -> dict[str, int]:
    """Router → requests that its process has ended, as `expertmesh balancer status` has it."""
    pids = {router: mesh.servers[router].pid for router in ROUTERS}
    servers = (await mesh_state.status(mesh)).servers
    return {
        server.server_id: server.load.requests_ended for server in servers if server.pid == pids.get(server.server_id)
    }


async def until_all_have_served(mesh: LocalMesh, requests: int) -> None:
    """So many in all since their starts, some on each router."""
    served: dict[str, int] = {}

    async def have() -> bool:
        served.update(await ended(mesh))
        return set(served) == set(ROUTERS) and min(served.values()) > 0 and sum(served.values()) >= requests

    await mesh_state.until(have, TIMEOUT_S, lambda: f"of {requests} requests the routers have ended {served}")


async def ask_over_http(mesh: LocalMesh) -> None:
    """A connection for each request."""

    def ask() -> None:
        with urllib.request.urlopen(f"http://{mesh.http}/v1/models", timeout=TIMEOUT_S) as answer:
            assert answer.status == 200

    for _ in range(NUM_STREAMS):
        await asyncio.to_thread(ask)
    for router in ROUTERS:
        counted = await asyncio.to_thread(mesh_state.metrics, mesh, router)
        assert counted["expertmesh_http_requests_total"] > 0, router


async def test_routers_share_an_address_and_lose_no_stream_of_another(mesh: LocalMesh) -> None:
    alone = Stream()
    await alone.run(mesh.router, LONG)
    assert len(alone.token_ids) == LONG

    async with Streams(mesh.router, 16) as streams:
        pass
    assert all(stream.finished and stream.token_ids == alone.token_ids[:16] for stream in streams)
    await until_all_have_served(mesh, 1 + NUM_STREAMS)
    await ask_over_http(mesh)

    async with Streams(mesh.router, LONG) as streams:
        with kept_down(mesh, "router-1"):
            # Until the kernel has closed all that it had: what connects before that may be lost with it.
            await mesh_state.until(_is_gone(mesh), TIMEOUT_S, lambda: "router-1 does not end")
            async with Streams(mesh.router, 4, count=4) as new:
                pass
    assert all(stream.finished and stream.token_ids == alone.token_ids[:4] for stream in new)
    broken = [stream for stream in streams if not stream.finished]
    assert 0 < len(broken) < NUM_STREAMS
    assert {stream.error for stream in broken} == {grpc.StatusCode.UNAVAILABLE}
    for stream in streams:
        assert stream.token_ids == alone.token_ids[: len(stream.token_ids)]
        assert stream.finished == (len(stream.token_ids) == LONG)

    # It starts again, at the same door.
    async def has_started_again() -> bool:
        return "router-1" in await ended(mesh)

    await mesh_state.until(has_started_again, TIMEOUT_S, lambda: "router-1 does not come back")
    async with Streams(mesh.router, 2):
        pass
    await until_all_have_served(mesh, NUM_STREAMS)

    # One that is asked to stop sends new connections to the other at once, and ends what it has.
    async with Streams(mesh.router, 32) as streams:
        mesh.kill("router-1", signal.SIGTERM)
    assert all(stream.finished and stream.token_ids == alone.token_ids[:32] for stream in streams)
    await mesh_state.until(_is_gone(mesh), TIMEOUT_S, lambda: "router-1 does not end")
    async with Streams(mesh.router, 2) as streams:
        pass
    assert all(stream.finished for stream in streams)


def _is_gone(mesh: LocalMesh) -> Callable[[], Awaitable[bool]]:
    async def is_gone() -> bool:
        return mesh.servers["router-1"].pid is None

    return is_gone
