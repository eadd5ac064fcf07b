"""Plans, their application and mode online through the real balancer, its services and its command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.balancer.compiling import KernelCompiler
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.balancer_stand import TIMEOUT_S, Stream, balancer, cli, config, join, wait_serving
from support.placement_policy import SwapPolicy

SKEWED = [400, 400, 100, 100, 100, 100, 100, 100]
NUM_PAIRS = 8 * 7 // 2


async def be_rank(stream: Stream) -> None:
    """Stage at once, switch when told to: all ranks of these tests hear the same."""
    await stream.next_view()
    while (message := await stream.next_message()) is not None:
        kind = message.WhichOneof("message")
        if kind == "plan":
            await stream.say(migration=status(message.plan.id, mesh_pb2.MIGRATION_PHASE_STAGED))
        elif kind == "commit":
            await stream.say(migration=status(message.commit.id, mesh_pb2.MIGRATION_PHASE_COMMITTED))


def status(migration_id: int, phase: mesh_pb2.MigrationPhase.ValueType) -> mesh_pb2.MigrationStatus:
    return mesh_pb2.MigrationStatus(id=migration_id, phase=phase, step=5)


async def report(stream: Stream, sequence: int, load: list[int]) -> None:
    """Tokens that choose one expert each."""
    layers = [
        mesh_pb2.LayerStats(
            layer=layer, version=1, tokens=sum(load), load=load, coactivation=[0] * NUM_PAIRS, slot_load=[0] * 16
        )
        for layer in (0, 2)
    ]
    await stream.say(stats=mesh_pb2.StatsReport(sequence=sequence, view_number=1, layers=layers))


@contextlib.asynccontextmanager
async def mesh(folder: Path, **settings: Any) -> AsyncIterator[tuple[str, admin_pb2_grpc.AdminServiceStub, Stream]]:
    """A view that serves: the balancer's address, its admin stub, the stream of the attention server."""
    settings = {"stats_half_life_tokens": 1000, **settings}
    async with balancer(config(folder, **settings)) as address, rpc.open_channel(address, TlsConfig()) as channel:
        streams = await join(channel, "a1", "e1", "e2")
        ranks = [asyncio.create_task(be_rank(stream), name=f"rank-{name}") for name, stream in streams.items()]
        try:
            await wait_serving(channel, 1)
            yield address, admin_pb2_grpc.AdminServiceStub(channel), streams["a1"]
        finally:
            for rank in ranks:
                rank.cancel()
            await asyncio.gather(*ranks, return_exceptions=True)


async def happened(stub: admin_pb2_grpc.AdminServiceStub, kind: str, count: int = 1) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        async for event in stub.ListEvents(admin_pb2.ListEventsRequest(follow=True)):
            count -= event.kind == kind
            if count == 0:
                return


async def counted(stub: admin_pb2_grpc.AdminServiceStub, tokens: float) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        answer = admin_pb2.GetLoadsResponse()
        while not answer.layers or answer.layers[0].tokens < tokens:
            answer = await stub.GetLoads(admin_pb2.GetLoadsRequest())


@pytest.fixture(autouse=True)
def swap_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The solver would have to be compiled."""
    monkeypatch.setattr("expertmesh.balancer.leading.solver_policy", lambda *_, **__: SwapPolicy())
    monkeypatch.setattr("expertmesh.balancer.leading.KernelCompiler", lambda: KernelCompiler(("true",)))


async def test_mode_online_moves_what_the_statistics_ask_for(tmp_path: Path) -> None:
    async with mesh(tmp_path, mode="online") as (_, stub, attention):
        await report(attention, 1, SKEWED)
        await happened(stub, "migration_committed", 2)
        answer = await stub.GetPlacement(admin_pb2.GetPlacementRequest())
        assert [layer.version for layer in answer.layers] == [2, 2]
        now = await stub.GetStatus(admin_pb2.GetStatusRequest())
        assert (now.balancer_mode, now.migrations_committed, len(now.migrations)) == ("online", 2, 0)
        loads = await stub.GetLoads(admin_pb2.GetLoadsRequest())
        assert [round(layer.balancedness, 2) for layer in loads.layers] == [1, 1]


async def test_of_two_plans_applied_at_once_one_wins(tmp_path: Path) -> None:
    async with mesh(tmp_path) as (_, stub, attention):
        with pytest.raises(grpc.aio.AioRpcError, match="no routing statistics yet"):
            await stub.GetPlan(admin_pb2.GetPlanRequest())
        await report(attention, 1, SKEWED)
        await counted(stub, 500)
        plan = await stub.GetPlan(admin_pb2.GetPlanRequest())
        assert [change.placement.layer for change in plan.changes] == [0, 2]
        assert (await stub.GetPlan(admin_pb2.GetPlanRequest(layers=[2]))).changes[0] == plan.changes[1]
        with pytest.raises(grpc.aio.AioRpcError, match="no MoE layers"):
            await stub.GetPlan(admin_pb2.GetPlanRequest(layers=[1]))
        wish = admin_pb2.ApplyRequest(view_number=1, layers=[change.placement for change in plan.changes])
        calls = await asyncio.gather(stub.Apply(wish), stub.Apply(wish), return_exceptions=True)
        answers = [call for call in calls if isinstance(call, admin_pb2.ApplyResponse)]
        errors = [call for call in calls if isinstance(call, grpc.aio.AioRpcError)]
        assert [layer.version for layer in answers[0].accepted] == [2, 2]
        assert len(errors) == 1
        assert errors[0].code() in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)
        await happened(stub, "migration_committed", 2)
        with pytest.raises(grpc.aio.AioRpcError, match="layer 0 has version 2, the placement replaces 1"):
            await stub.Apply(wish)


@pytest.mark.slow
async def test_the_command_line_plans_applies_and_watches(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    async with mesh(tmp_path / "state") as (address, stub, attention):
        where = ("--balancer", address)
        code, _, err = await cli("plan", *where)
        assert code == 1
        assert "FAILED_PRECONDITION: no routing statistics yet" in err
        await report(attention, 1, SKEWED)
        await counted(stub, 500)
        code, out, err = await cli("plan", "--out", str(file), "--json", *where)
        assert (code, err) == (0, "")
        layer = json.loads(out)["layers"][0]
        assert (layer["layer"], layer["version"], layer["slots_loaded"], layer["worthwhile"]) == (0, 1, 2, True)
        assert layer["balancedness"] == [0.7, 1.0]
        code, out, _ = await cli("plan", "--full", *where)
        assert "0.700 → 1.000" in out
        code, out, err = await cli("apply", str(file), "--json", *where)
        assert (code, err) == (0, "")
        assert json.loads(out)["layers"][0] == {"layer": 0, "version": 2, "migrated": True}
        code, out, _ = await cli("placement", "0", "--json", *where)
        assert json.loads(out)["layers"][0]["slots"] == layer["slots"]
        code, _, err = await cli("apply", str(file), *where)
        assert code == 1
        assert "ABORTED: layer 0 has version 2, the placement replaces 1" in err
        code, out, _ = await cli("apply", *where)
        assert (code, out) == (0, "nothing to change\n")
        code, out, _ = await cli("events", *where)
        assert out.count("migration_committed") == 2
        code, out, _ = await cli("watch", "--count", "2", "--interval", "0.1", "--json", *where)
        assert [json.loads(line)["versions"] for line in out.splitlines()] == [{"0": 2, "2": 2}] * 2
        code, out, _ = await cli("watch", "--count", "1", *where)
        assert "2 committed" in out
        assert "migration_committed layer 2" in out


async def test_a_switched_mode_survives_a_restart(tmp_path: Path) -> None:
    settings = config(tmp_path, mode="static")
    for expected, wanted in (("static", "online"), ("online", "static"), ("static", None)):
        async with balancer(settings) as address, rpc.open_channel(address, TlsConfig()) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            now = await stub.GetStatus(admin_pb2.GetStatusRequest())
            assert now.balancer_mode == expected
            if wanted is not None:
                await stub.SetMode(admin_pb2.SetModeRequest(mode=wanted))


@pytest.mark.slow
async def test_the_command_line_switches_modes_and_refuses_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    async with mesh(tmp_path / "state") as (address, stub, _):
        where = ("--balancer", address)
        assert (await cli("mode", *where))[1] == "static, 2 layers at a time\n"
        code, out, _ = await cli("mode", "online", "--layer-updates-per-iter", "3", "--json", *where)
        assert json.loads(out) == {"mode": "online", "layer_updates_per_iter": 3, "previous": "static"}
        code, out, _ = await cli("status", "--json", *where)
        assert json.loads(out)["balancer"]["mode"] == "online"
        code, _, err = await cli("mode", "offline", *where)
        assert code == 1
        assert "INVALID_ARGUMENT: mode 'offline'" in err
        table = [0, 1, 2, 3, 4, 5, 6, 7]
        content = {
            "format": 1,
            "model": "m",
            "fingerprint": "another",
            "num_experts": 8,
            "view": 1,
            "servers": ["e1"] * 8,
            "layers": [{"layer": 0, "version": 1, "slots": table}],
        }
        file.write_text(json.dumps(content))
        code, _, err = await cli("apply", str(file), *where)
        assert code == 1
        assert "INVALID_ARGUMENT: the placement was made for the model fingerprint another, this mesh runs f" in err
        content["layers"] = [{"layer": 0, "version": 1, "slots": [*table[:7], -1]}]
        file.write_text(json.dumps(content))
        code, _, err = await cli("apply", str(file), *where)
        assert code == 2
        assert "layer 0: no slot holds expert 7" in err
        assert "Traceback" not in err
        versions = [layer.version for layer in (await stub.GetPlacement(admin_pb2.GetPlacementRequest())).layers]
        assert versions == [1, 1]
