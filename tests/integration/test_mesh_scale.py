"""A mesh that grows and shrinks while it generates: by its scale policy, and by hand."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from expertmesh.cli.local_mesh import LAUNCHER, LocalMesh
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.v1 import admin_pb2
from support.mesh import demo_prompts, generate_all, greedy_request, kept_down, logs, mesh_config, start_mesh
from support.mesh_state import events, members, status, until

pytestmark = pytest.mark.slow

NUM_TOKENS = 32
TIMEOUT_S = 60.0
REQUESTS = [greedy_request(prompt.text, NUM_TOKENS) for prompt in demo_prompts()[::3]]


def config() -> MeshConfig:
    """Four sequences fill an attention server, so that a few clients make a queue."""
    base = mesh_config(attention__servers=1, attention__max_num_seqs=4, expert__servers=2).model_dump()
    scaling = {"policy": "on", "interval_s": 0.2, "hold_s": 0.6, "cooldown_s": 1.0, "max_waiting": 2}
    return parse_config({**base, "scaling": {**scaling, "attention": {"max_servers": 2}}})


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    mesh = start_mesh(tmp_path_factory.mktemp("scale") / "mesh", config(), restart=True)
    yield mesh
    mesh.stop()


def balancer(mesh: LocalMesh, *arguments: str) -> dict[str, Any]:
    """What a command of the command line answers, which it does with status 0."""
    command = [sys.executable, "-P", "-m", "expertmesh.cli.main", "balancer", *arguments, "--json"]
    done = subprocess.run(
        [*command, "--balancer", mesh.balancer], capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr + logs(mesh)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def until_serving(mesh: LocalMesh, *ranks: str) -> None:
    async def serving() -> bool:
        return set(await members(mesh)) == set(ranks)

    await until(serving, TIMEOUT_S, lambda: f"no view of {ranks}\n{logs(mesh)}")


async def test_a_queue_brings_a_server_which_goes_when_it_is_idle(mesh: LocalMesh) -> None:
    expected = [output.token_ids for output in await generate_all(mesh.router, REQUESTS, concurrency=4)]
    crowd, calm = asyncio.Event(), asyncio.Event()
    counted = 0

    async def traffic(ended: asyncio.Event, concurrency: int) -> None:
        nonlocal counted
        while not ended.is_set():
            outputs = await generate_all(mesh.router, REQUESTS, concurrency=concurrency)
            assert [output.token_ids for output in outputs] == expected
            counted += len(outputs)

    async with asyncio.TaskGroup() as group:
        group.create_task(traffic(calm, 1))
        group.create_task(traffic(crowd, 16))
        await until_serving(mesh, "attention-0", "attention-1", "expert-0", "expert-1")
        crowd.set()
        drained = [event for event in await events(mesh) if event.kind == "drain_asked"]
        assert drained == []
        names = {frozenset(("attention-0", "expert-0", "expert-1")), frozenset(("attention-1", "expert-0", "expert-1"))}

        async def alone() -> bool:
            return frozenset(await members(mesh)) in names

        await until(alone, TIMEOUT_S, lambda: f"nobody left\n{logs(mesh)}")
        calm.set()
    assert counted >= 2 * len(REQUESTS)
    said = [event.message for event in await events(mesh) if event.kind == "scale_target"]
    assert len(said) == 2, said
    assert said[0].startswith("1 → 2 servers, by the scale policy (")
    assert said[1].startswith("2 → 1 servers, by the scale policy (")

    async def one_is_left() -> bool:
        scale = (await asyncio.to_thread(balancer, mesh, "scale"))["roles"]["attention"]
        return bool(scale == {"target": 1, "servers": 1, "serving": 1})

    await until(one_is_left, TIMEOUT_S, lambda: f"the other one did not leave\n{logs(mesh)}")


async def test_servers_are_added_by_hand_and_drained_ones_stay_away(mesh: LocalMesh) -> None:
    with kept_down(mesh, "balancer"):
        pass
    found = admin_pb2.GetStatusResponse()

    async def watched() -> bool:
        if mesh.servers["balancer"].starts < 2 or not await members(mesh):
            return False
        found.CopyFrom(await status(mesh))
        return found.serving and list(found.launchers) == [LAUNCHER]

    await until(watched, TIMEOUT_S, lambda: f"{found}\n{logs(mesh)}")
    assert [entry.target for entry in found.scale.roles] == [1, 2], "it remembers what its policy did"
    added = await asyncio.to_thread(balancer, mesh, "add", "expert")
    assert (added["target"], added["added"], added["serving"]) == (3, ["expert-2"], True)
    left = await asyncio.to_thread(balancer, mesh, "drain", "expert-0")
    assert left["left"] is True
    scale = (await asyncio.to_thread(balancer, mesh, "status"))["scale"]
    assert scale["roles"]["expert"] == {"target": 2, "servers": 2, "serving": 2}
    assert (mesh.servers["expert-0"].pid, mesh.servers["expert-0"].starts) == (None, 1)
