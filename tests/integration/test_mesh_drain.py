"""Servers leave a mesh that generates: no request fails, no token changes, and what is needed is kept."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from support.mesh import demo_prompts, generate_all, greedy_request, logs, mesh_config, start_mesh
from support.mesh_state import until

pytestmark = pytest.mark.slow

NUM_TOKENS = 48
TIMEOUT_S = 60.0
PROMPTS = [prompt.text for prompt in demo_prompts()[::3]]


def drain(mesh: LocalMesh, server: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "expertmesh.cli.main", "balancer", "drain", server, "--json", *options]
    return subprocess.run(
        [*command, "--balancer", mesh.balancer], capture_output=True, text=True, timeout=90, check=False
    )


async def until_ended(mesh: LocalMesh, server: str) -> None:
    """Its process ends by itself, and is not started again because it left on purpose."""

    async def ended() -> bool:
        return mesh.servers[server].pid is None

    await until(ended, TIMEOUT_S, lambda: f"{server} did not end\n{logs(mesh)}")
    assert mesh.servers[server].starts == 1


async def test_servers_leave_while_tokens_flow(tmp_path: Path) -> None:
    # Two expert servers hold all 32 experts.
    mesh = start_mesh(tmp_path / "mesh", mesh_config(expert__slots_per_server=16), restart=True)
    try:
        requests = [greedy_request(prompt, NUM_TOKENS) for prompt in PROMPTS]
        expected = [output.token_ids for output in await generate_all(mesh.router, requests, concurrency=8)]
        stop = asyncio.Event()

        async def traffic() -> None:
            while not stop.is_set():
                outputs = await generate_all(mesh.router, requests, concurrency=8)
                assert [output.token_ids for output in outputs] == expected

        async with asyncio.TaskGroup() as group:
            group.create_task(traffic())
            for server in ("expert-0", "attention-1"):
                done = await asyncio.to_thread(drain, mesh, server)
                assert done.returncode == 0, done.stderr + logs(mesh)
                assert json.loads(done.stdout)["left"] is True
                await until_ended(mesh, server)
            stop.set()
        for server, why in (("expert-1", "room for 16 of the model's 32"), ("attention-0", "last attention server")):
            refused = await asyncio.to_thread(drain, mesh, server)
            assert refused.returncode == 1
            assert "FAILED_PRECONDITION" in refused.stderr
            assert why in refused.stderr
        outputs = await generate_all(mesh.router, requests, concurrency=8)
        assert [output.token_ids for output in outputs] == expected
    finally:
        mesh.stop()
