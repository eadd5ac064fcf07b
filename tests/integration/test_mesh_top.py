"""``expertmesh top`` on a live mesh."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE

import pytest

from support.live_mesh import LiveMesh
from support.mesh import generate_all, greedy_request

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0


async def test_top_sees_the_traffic(live: LiveMesh) -> None:
    """Requests run until it has answered."""
    command = (sys.executable, "-m", "expertmesh.cli.main", "top", "--once", "--json", "--interval", "2")
    process = await asyncio.create_subprocess_exec(*command, "--balancer", live.mesh.balancer, stdout=PIPE)
    answered = asyncio.create_task(process.communicate())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not answered.done():
                requests = [greedy_request([7, seed], 16, ignore_eos=True) for seed in range(1, 5)]
                await generate_all(live.router, requests, concurrency=4)
            shown = json.loads((await answered)[0])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert shown["rates"]["generation_tokens_per_s"] > 0
    assert shown["rates"]["requests_per_s"] > 0
    assert 0 < shown["tpot_s"] < TIMEOUT_S
    assert 0 < shown["ttft_s"] < TIMEOUT_S
    servers = {server["id"]: server for server in shown["servers"]}
    assert {"router-0", *live.ranks} == set(servers)
    assert {server["state"] for server in servers.values()} == {"serving"}
    loads = [server["load"] for server in servers.values() if server["role"] == "expert"]
    assert sum(loads) == pytest.approx(len(loads), abs=0.01), "shares of the mean"
