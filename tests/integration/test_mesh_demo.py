"""What ``make demo`` runs in its mesh: it ends with 0, having moved an expert and killed two servers."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from support.live_mesh import SETTLE_TIMEOUT_S, LiveMesh
from support.mesh_state import until

pytestmark = pytest.mark.slow

DEMO = Path(__file__).parents[2] / "demo/demo.py"
TIMEOUT_S = 240


async def test_demo_moves_an_expert_and_kills_servers_without_losing_a_token(live: LiveMesh) -> None:
    environment = {**os.environ, "EXPERTMESH_ROUTER": live.router, "EXPERTMESH_BALANCER": live.mesh.balancer}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(DEMO), env=environment, stdout=asyncio.subprocess.PIPE, cwd=live.mesh.state_dir
    )
    try:
        stdout, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    output = stdout.decode()
    assert process.returncode == 0, output
    assert re.search(r"layer \d+, expert \d+: expert-\d \(slot \d+\) to expert-\d \(slot \d+\), version \d+", output)
    assert len(re.findall(r"^\$ kill -9 \d+ ", output, re.MULTILINE)) == 2
    received = re.search(r"(\d+) tokens expected, (\d+) received; 0 requests lost; 0 answers differ", output)
    assert received is not None, output
    assert received[1] == received[2]
    # Supervision and balancer do not hear of an end at the same moment.
    await until(live.is_whole, SETTLE_TIMEOUT_S, lambda: "the mesh is not whole after the demo")
    await live.until_idle()
