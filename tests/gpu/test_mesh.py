"""A whole mesh on two GPUs: processes, router and balancer, in float32, so that every token can be compared."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support import mesh_state
from support.mesh import demo_prompts, generate_all, greedy_request, logs, mesh_config
from support.nixl import NIXL_IS_MISSING
from support.reference import encode, greedy

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

T = TypeVar("T")
START_S = 150.0
LENGTH = 800  # long enough that something can happen meanwhile
NUM_PROMPTS = 12
LAYOUTS = {"colocated": {"both_servers": 2, "attention__servers": 0, "expert__servers": 0}}
LAYOUTS["apart"] = {"both_servers": 0, "attention__servers": 1, "expert__servers": 1}


@pytest.fixture(scope="module", params=LAYOUTS)
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    config = mesh_config(
        device="cuda",
        dataplane__backend="nccl",
        balancer__view_timeout_s=START_S,
        balancer__formation_timeout_s=START_S,
        balancer__migration_bytes_per_s=2**30,
        telemetry__metrics_port=0,
        attention__max_num_seqs=16,
        attention__kv_cache_bytes=2**28,
        **LAYOUTS[request.param],
    )
    running = LocalMesh(config, StateDir.claim(tmp_path_factory.mktemp("mesh")))
    try:
        running.start()
        running.wait_ready(START_S)
        asyncio.run(mesh_state.until(lambda: _is_whole(running), START_S, lambda: logs(running)))
        yield running
    except BaseException:
        print(logs(running))
        raise
    finally:
        running.stop()


def run(mesh: LocalMesh, story: Coroutine[Any, Any, T]) -> T:
    """What comes of it; one that fails shows what the servers have to say."""
    try:
        return asyncio.run(story)
    except BaseException:
        print(logs(mesh, 300))
        raise


async def _is_whole(mesh: LocalMesh) -> bool:
    return await mesh_state.stepping(mesh) is not None


async def generate(mesh: LocalMesh, length: int) -> list[list[int]]:
    prompts = [prompt.text for prompt in demo_prompts()[:NUM_PROMPTS]]
    requests = [greedy_request(prompt, length, ignore_eos=True) for prompt in prompts]
    outputs = await generate_all(mesh.router, requests, concurrency=len(requests))
    return [output.token_ids for output in outputs]


def expected(length: int) -> list[list[int]]:
    path: Path = demo_model_path()
    prompts = tuple(encode(path, prompt.text) for prompt in demo_prompts()[:NUM_PROMPTS])
    return [list(tokens) for tokens in greedy(path, prompts, length, None)]


def num_captures(mesh: LocalMesh) -> int:
    return sum(log.read_text(encoding="utf-8").count("CUDA graphs in") for log in mesh.state_dir.glob("*.log"))


async def swap_experts(mesh: LocalMesh) -> int:
    """In every layer the first experts change places with the last ones; returns when all layers have switched."""
    async with rpc.open_channel(mesh.balancer, TlsConfig()) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        found = await admin.GetPlacement(admin_pb2.GetPlacementRequest())
        request = admin_pb2.ApplyRequest(view_number=found.view_number)
        for layer in found.layers:
            slots = list(layer.slots)
            held = [slot for slot, expert in enumerate(slots) if expert >= 0]
            for first, last in zip(held[:2], held[-2:], strict=True):
                slots[first], slots[last] = slots[last], slots[first]
            request.layers.add(layer=layer.layer, version=layer.version, slots=slots)
        accepted = await admin.Apply(request)
        wanted = {layer.layer: layer.version for layer in accepted.accepted}
        deadline_s = time.monotonic() + 30.0
        while True:
            now = await admin.GetPlacement(admin_pb2.GetPlacementRequest())
            if all(layer.version >= wanted.get(layer.layer, 0) for layer in now.layers):
                return len(wanted)
            assert time.monotonic() < deadline_s, "not all layers have migrated"
            await asyncio.sleep(0.02)  # the balancer has no call that waits for it


def test_tokens_are_those_of_transformers_while_experts_migrate(mesh: LocalMesh) -> None:
    captures = num_captures(mesh)

    async def generate_and_migrate() -> tuple[list[list[int]], int]:
        generating = asyncio.create_task(generate(mesh, LENGTH))
        layers = await swap_experts(mesh)
        assert not generating.done(), "the migrations were to happen while tokens are generated"
        return await generating, layers

    tokens, layers = run(mesh, generate_and_migrate())
    assert tokens == expected(LENGTH)
    assert layers >= 2
    assert num_captures(mesh) == captures == 2, "each rank has captured its graphs once, for the view"
    ranks = mesh_state.rank_ids(mesh, ("both", "expert"))
    came = mesh_state.weights_that_came(mesh, ranks)
    print("weights that came from another rank, bytes and seconds:", came)
    way = "tcp" if NIXL_IS_MISSING else "nixl"  # as `balancer.migration_transport: auto` has it
    assert [*came] == ([way] if len(ranks) > 1 else [])


def test_no_token_is_lost_when_a_rank_is_killed(mesh: LocalMesh) -> None:
    victim = next(name for name in ("both-1", "expert-0") if name in mesh.servers)
    captures = num_captures(mesh)

    async def generate_and_kill() -> tuple[list[list[int]], float]:
        generating = asyncio.create_task(generate(mesh, LENGTH))
        await asyncio.sleep(0.2)  # in the middle of it
        assert not generating.done()
        killed_s = time.monotonic()
        mesh.kill(victim, signal.SIGKILL)
        return await generating, time.monotonic() - killed_s

    tokens, seconds = run(mesh, generate_and_kill())
    print(f"all tokens of all requests {seconds:.1f} s after {victim} was killed")
    assert tokens == expected(LENGTH)
    assert num_captures(mesh) > captures, "a view without the killed process has begun"
