"""Loads and recordings of a mesh of real processes: they agree with each other and change no token."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from expertmesh.cli.admin_loads import loads_as_dict
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support.mesh import demo_prompts, generate_all, greedy_request, mesh_config, start_mesh

pytestmark = pytest.mark.slow

NUM_LAYERS, NUM_EXPERTS, TOP_K = 8, 32, 4
TIMEOUT_S = 60.0


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[LocalMesh]:
    """Two attention and two expert servers, replicas, nothing forgotten."""
    config = mesh_config(
        attention__servers=2,
        expert__servers=2,
        expert__num_slots=40,
        attention__enable_prefix_caching=False,
        balancer__stats_interval_s=0.1,
        balancer__stats_half_life_tokens=10**12,
    )
    running = start_mesh(tmp_path / "mesh", config)
    yield running
    running.stop()


async def started(recording: grpc.aio.UnaryStreamCall[admin_pb2.RecordRequest, admin_pb2.RecordResponse]) -> None:
    """Both attention servers record."""
    async with asyncio.timeout(TIMEOUT_S):
        begun = set[str]()
        while len(begun) < 2:
            part = await recording.read()
            assert isinstance(part, admin_pb2.RecordResponse)
            assert part.num_tokens == 0
            begun.add(part.server_id)


async def recorded(
    recording: grpc.aio.UnaryStreamCall[admin_pb2.RecordRequest, admin_pb2.RecordResponse], tokens: int
) -> np.ndarray:
    """int16 [layers, tokens, K]."""
    parts = list[np.ndarray]()
    async with asyncio.timeout(TIMEOUT_S):
        while sum(part.shape[1] for part in parts) < tokens:
            part = await recording.read()
            assert isinstance(part, admin_pb2.RecordResponse)
            parts.append(np.frombuffer(part.topk, "<i2").reshape(NUM_LAYERS, part.num_tokens, TOP_K))
    return np.concatenate(parts, axis=1)


async def loads_of(stub: admin_pb2_grpc.AdminServiceStub, tokens: int) -> admin_pb2.GetLoadsResponse:
    """Once so many tokens have been reported."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            loads = await stub.GetLoads(admin_pb2.GetLoadsRequest())
            if all(round(layer.tokens) >= tokens for layer in loads.layers):
                return loads
            await asyncio.sleep(0.05)


async def test_a_trace_is_its_load_and_changes_no_token(mesh: LocalMesh) -> None:
    """Prompts and all generated tokens but the last pass through the layers."""
    requests = [greedy_request(prompt.text, 12) for prompt in demo_prompts()[:8]]
    async with rpc.open_channel(mesh.balancer, TlsConfig()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        recording = stub.Record(admin_pb2.RecordRequest(max_tokens=1_000_000))
        await started(recording)
        while_recorded = await generate_all(mesh.router, requests, concurrency=4)
        tokens = sum(output.finish.prompt_tokens + len(output.token_ids) - 1 for output in while_recorded)
        topk_LTK = await recorded(recording, tokens)
        loads = await loads_of(stub, tokens)
        recording.cancel()
    assert topk_LTK.shape == (NUM_LAYERS, tokens, TOP_K)
    for index, layer in enumerate(loads.layers):
        assert layer.tokens == pytest.approx(tokens)
        count_E = np.bincount(topk_LTK[index].ravel(), minlength=NUM_EXPERTS)
        np.testing.assert_allclose(layer.load, count_E, atol=0.01)
        assert sum(layer.rank_load) == pytest.approx(tokens * TOP_K)
        assert layer.balancedness == pytest.approx(np.mean(layer.rank_load) / max(layer.rank_load))
        assert 1 <= layer.fanout_ranks <= 2
        assert layer.fanout_nodes == pytest.approx(1)
    shown = await asyncio.to_thread(
        subprocess.run, expertmesh_balancer(mesh, "loads", "--json"), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["layers"] == loads_as_dict(loads)["layers"]
    afterwards = await generate_all(mesh.router, requests, concurrency=4)
    assert [output.token_ids for output in afterwards] == [output.token_ids for output in while_recorded]


async def test_the_command_line_records_while_a_server_dies(mesh: LocalMesh, tmp_path: Path) -> None:
    out = tmp_path / "trace.npz"
    command = ["record", "--out", str(out), "--tokens", "150"]
    recording = await asyncio.create_subprocess_exec(
        *expertmesh_balancer(mesh, *command), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert recording.stderr is not None
        async with asyncio.timeout(TIMEOUT_S):
            begun = {await recording.stderr.readline(), await recording.stderr.readline()}
        assert begun == {b"attention-0 records\n", b"attention-1 records\n"}
        again = await asyncio.to_thread(
            subprocess.run, expertmesh_balancer(mesh, *command), capture_output=True, text=True, timeout=TIMEOUT_S
        )
        assert (again.returncode, "ALREADY_EXISTS" in again.stderr) == (1, True)
        mesh.kill("attention-0", signal.SIGKILL)
        requests = [greedy_request(prompt.text, 12) for prompt in demo_prompts()[:8]]
        await generate_all(mesh.router, requests, concurrency=4)
        async with asyncio.timeout(TIMEOUT_S):
            assert await recording.wait() == 0
    finally:
        if recording.returncode is None:
            recording.kill()
            await recording.wait()
    with np.load(out, allow_pickle=False) as trace:
        assert int(trace["num_experts"]) == NUM_EXPERTS
        assert (trace["topk"].dtype, trace["topk"].shape) == (np.int16, (NUM_LAYERS, 150, TOP_K))
        assert trace["topk"].min() >= 0
        assert trace["topk"].max() < NUM_EXPERTS


def expertmesh_balancer(mesh: LocalMesh, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "expertmesh.cli.main", "balancer", *arguments, "--balancer", mesh.balancer]
