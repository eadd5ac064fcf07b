"""A rank whose device is lost asks to be started again; ``up`` does that, and streams that run meanwhile stay whole."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.errors import EXIT_DEVICE_LOST
from expertmesh.v1 import generate_pb2_grpc
from support.mesh import (
    REQUEST_TIMEOUT_S,
    collect,
    demo_prompts,
    generate_all,
    greedy_request,
    logs,
    mesh_config,
    start_mesh,
)
from support.mesh_state import stepping, until

pytestmark = pytest.mark.slow

VICTIM = "both-1"

_LOSES_ITS_DEVICE = """
import os, sys

if {victim!r} in sys.orig_argv:
    from expertmesh.mesh.dataplane.collective import CollectivePlane
    from expertmesh.mesh.errors import DeviceLostError

    def combine(plane, y_NH, handle, combine=CollectivePlane.combine):
        try:
            os.unlink({switch!r})
        except FileNotFoundError:
            return combine(plane, y_NH, handle)
        raise DeviceLostError("the device was taken away")

    CollectivePlane.combine = combine
"""
"""There is no device to lose here, so one exchange of one rank says that it was; what follows is the mesh's own."""


async def test_a_rank_whose_device_is_lost_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch, hooks = tmp_path / "take-the-device-away", tmp_path / "hooks"
    hooks.mkdir()
    hook = _LOSES_ITS_DEVICE.format(victim=VICTIM, switch=str(switch))
    (hooks / "sitecustomize.py").write_text(hook, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(hooks), os.environ.get("PYTHONPATH")])))
    requests = [greedy_request(prompt.text, 100, ignore_eos=True) for prompt in demo_prompts()[:4]]
    config = mesh_config(attention__servers=0, expert__servers=0, both_servers=2, expert__slots_per_server=32)
    mesh = await asyncio.to_thread(start_mesh, tmp_path / "mesh", config, restart=True)
    try:
        expected = await generate_all(mesh.router, requests, concurrency=4)
        async with rpc.open_channel(mesh.router, TlsConfig()) as channel, asyncio.TaskGroup() as group:
            stub = generate_pb2_grpc.GenerationServiceStub(channel)
            switch.touch()
            tasks = [group.create_task(collect(stub, request)) for request in requests]
        assert not switch.exists(), "too late: the streams ended before the device was lost"
        for task, answer in zip(tasks, expected, strict=True):
            assert (task.result().token_ids, task.result().text) == (answer.token_ids, answer.text)

        async def is_whole() -> bool:
            return mesh.servers[VICTIM].starts == 2 and await stepping(mesh) is not None

        await until(is_whole, REQUEST_TIMEOUT_S, lambda: f"{VICTIM} did not come back\n{logs(mesh, 15)}")
        log = (mesh.state_dir / f"{VICTIM}.log").read_text(encoding="utf-8")
        assert f"{VICTIM} exits with status {EXIT_DEVICE_LOST}, to be started again" in log
        assert [server.id for server in mesh.servers.values() if server.starts > 1] == [VICTIM]
    finally:
        await asyncio.to_thread(mesh.stop)
