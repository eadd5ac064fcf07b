"""Mode online on a mesh of processes: layers migrate under traffic that shifts, the balancer and a rank are killed in
the middle, and every token is the reference's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support import reference
from support.mesh import demo_prompts, generate_all, greedy_request, logs, mesh_config, start_mesh

pytestmark = [pytest.mark.slow]

NUM_TOKENS = 32
DEMO_EOS = 0
NUM_COMMITS = 10
TIMEOUT_S = 240.0  # the first run on a machine compiles the solver


@pytest.fixture(scope="module")
def expected() -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Domain → prompts and their greedy tokens."""
    path, found = demo_model_path(), dict[str, list[tuple[str, tuple[int, ...]]]]()
    for prompt in demo_prompts():
        if prompt.domain in ("code", "stories", "german"):
            tokens = reference.greedy(path, (reference.encode(path, prompt.text),), NUM_TOKENS, DEMO_EOS)
            found.setdefault(prompt.domain, []).append((prompt.text, tuple(tokens[0])))
    return found


@asynccontextmanager
async def traffic(router: str, expected: dict[str, list[tuple[str, tuple[int, ...]]]]) -> AsyncIterator[None]:
    """One domain after another for as long as the block runs; every output has to be the reference's."""
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            for prompts in expected.values():
                requests = [greedy_request(text, NUM_TOKENS) for text, _ in prompts] * 4
                outputs = await generate_all(router, requests, concurrency=10)
                for (text, tokens), output in zip(prompts * 4, outputs, strict=True):
                    ids = output.token_ids
                    assert tuple(ids[:-1] if ids and ids[-1] == DEMO_EOS else ids) == tokens, text

    async with asyncio.TaskGroup() as group:
        task = group.create_task(run(), name="traffic")
        yield
        stop.set()
        await task


async def committed(balancer: str, count: int) -> None:
    """Until the balancer, which may be on its way back, has seen so many migrations through since it started."""
    async with asyncio.timeout(TIMEOUT_S), rpc.open_channel(balancer, TlsConfig()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        found = 0
        while found < count:
            try:
                status = await stub.GetStatus(admin_pb2.GetStatusRequest(), wait_for_ready=True, timeout=TIMEOUT_S)
                found = status.migrations_committed
            except grpc.aio.AioRpcError as error:
                assert error.code() == grpc.StatusCode.UNAVAILABLE  # noqa: PT017 - the balancer is being killed
            await asyncio.sleep(0.1)


async def test_migrations_never_change_a_token_whatever_is_killed(
    tmp_path: Path, expected: dict[str, list[tuple[str, tuple[int, ...]]]]
) -> None:
    settings = mesh_config(
        expert__servers=3,
        expert__num_slots=40,
        balancer__mode="online",
        balancer__stats_half_life_tokens=300,
        balancer__stats_interval_s=0.3,
        balancer__layer_updates_per_iter=4,
    )
    mesh = await asyncio.to_thread(start_mesh, tmp_path, settings, restart=True)
    try:
        async with traffic(mesh.router, expected):
            await committed(mesh.balancer, NUM_COMMITS)
            mesh.kill("balancer")
            await committed(mesh.balancer, NUM_COMMITS)
            mesh.kill("expert-1")
            await committed(mesh.balancer, 2 * NUM_COMMITS)
    except BaseException:
        print(logs(mesh))
        raise
    finally:
        await asyncio.to_thread(mesh.stop)
