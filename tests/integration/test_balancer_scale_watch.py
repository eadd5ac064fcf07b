"""A launcher that is not `expertmesh up`, and the commands that change what it hears."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from expertmesh.cli.admin import app
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.balancer_stand import TIMEOUT_S, balancer, config

pytestmark = pytest.mark.slow


async def run(address: str, *arguments: str) -> tuple[int, str, str]:
    """A command of `expertmesh balancer`, in this process."""
    done = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, "--balancer", address])
    return done.exit_code, done.stdout.strip(), done.stderr.strip()


async def test_a_watcher_hears_of_every_change_and_is_shown_as_long_as_it_lives(tmp_path: Path) -> None:
    async with balancer(config(tmp_path)) as address, asyncio.timeout(TIMEOUT_S):
        async with rpc.open_channel(address, TlsConfig()) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            watch = stub.WatchScale(admin_pb2.WatchScaleRequest(launcher="slurm"))

            async def heard() -> tuple[int, dict[int, int]]:
                response: Any = await watch.read()
                return response.scale.version, {entry.role: entry.target for entry in response.scale.roles}

            version, targets = await heard()
            assert targets == {mesh_pb2.ROLE_ATTENTION: 1, mesh_pb2.ROLE_EXPERT: 2}
            code, out, err = await run(address, "scale", "expert", "5", "--no-wait", "--json")
            assert (code, err) == (0, "")
            assert json.loads(out)["version"] == version + 1
            assert await heard() == (version + 1, {**targets, mesh_pb2.ROLE_EXPERT: 5})
            code, out, _ = await run(address, "scale")
            assert out == "servers: 0 of 1 attention, 0 of 5 expert; started by slurm; scale policy off"
            stale = admin_pb2.SetScaleRequest(version=version, role=mesh_pb2.ROLE_EXPERT, target=6)
            with pytest.raises(grpc.aio.AioRpcError) as late:
                await stub.SetScale(stale)
            assert late.value.code() == grpc.StatusCode.ABORTED
            watch.cancel()
        code, out, err = await run(address, "add", "attention", "--timeout", "0")
        assert (code, out) == (1, "0 of 2 attention servers serve after 0 s")
        assert "no launcher watches the scale" in err
        code, out, err = await run(address, "scale", "expert")
        assert code == 2
        assert "give ROLE and TARGET, or none of them" in err
