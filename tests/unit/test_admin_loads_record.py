"""``expertmesh balancer loads`` and ``record`` against a balancer of a few lines."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from expertmesh.cli import admin, admin_client
from expertmesh.cli.admin_loads import heat, loads_as_dict
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import admin_pb2

LOADS = admin_pb2.GetLoadsResponse(
    expert_servers=["e0", "e1"],
    layers=[
        admin_pb2.LayerLoads(
            layer=3, load=[1, 0, 3], balancedness=0.75, fanout_ranks=1.5, fanout_nodes=1, tokens=2, rank_load=[1, 3]
        ),
        admin_pb2.LayerLoads(layer=4, load=[0, 0, 0], balancedness=1, rank_load=[0, 0]),
    ],
)


class StubBalancer:
    """The two calls of the stub that these commands make."""

    def __init__(self) -> None:
        self.parts: list[admin_pb2.RecordResponse] = []
        self.failure: grpc.StatusCode | None = None

    async def GetLoads(self, request: admin_pb2.GetLoadsRequest, timeout: float) -> admin_pb2.GetLoadsResponse:
        return LOADS

    async def Record(
        self, request: admin_pb2.RecordRequest, timeout: float | None
    ) -> AsyncIterator[admin_pb2.RecordResponse]:
        for part in self.parts:
            yield part
        if self.failure is not None:
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(self.failure, nothing, nothing, details="the reason")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> StubBalancer:
    made = StubBalancer()

    class Open:
        async def __aenter__(self) -> StubBalancer:
            return made

        async def __aexit__(self, *_: object) -> None: ...

    monkeypatch.setattr(admin_client, "_admin", lambda address, tls, key: Open())
    return made


def call(*arguments: str) -> Any:
    return CliRunner().invoke(admin.app, [*arguments, "--balancer", "127.0.0.1:1"])


def test_loads_as_json(stub: StubBalancer) -> None:
    answer = call("loads", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout) == loads_as_dict(LOADS)
    assert loads_as_dict(LOADS)["layers"][0] == {
        "layer": 3,
        "load": [1.0, 0.0, 3.0],
        "balancedness": 0.75,
        "fanout_ranks": 1.5,
        "fanout_nodes": 1.0,
        "tokens": 2.0,
        "rank_load": [1.0, 3.0],
    }


def test_loads_as_a_table(stub: StubBalancer) -> None:
    lines = call("loads").stdout.splitlines()
    assert lines[0] == "rank bars: e0 e1"
    assert lines[2].split() == ["3", "2", "0.750", "1.50", "1.00", "▃█", "▃", "█"]
    assert lines[3].split() == ["4", "0", "1.000", "-", "-"]


def test_heat_shows_what_is_small_and_joins_what_is_too_much() -> None:
    assert heat([0, 1e-9, 1, 2]) == " ▁▄█"
    assert heat([0, 0]) == "  "
    assert heat([1] * 10, width=4) == "███▃"


def part(first: int, tokens: int) -> admin_pb2.RecordResponse:
    topk_LTK = np.arange(2 * tokens * 2).reshape(2, tokens, 2) + first
    return admin_pb2.RecordResponse(
        server_id="a0", num_experts=99, layers=[0, 5], num_tokens=tokens, top_k=2, topk=topk_LTK.astype("<i2").tobytes()
    )


def test_a_trace_is_written(stub: StubBalancer, tmp_path: Path) -> None:
    stub.parts = [part(0, 0), part(0, 3), part(50, 1)]
    out = tmp_path / "trace.npz"
    answer = call("record", "--out", str(out), "--tokens", "4")
    assert (answer.exit_code, answer.stdout) == (0, f"{out}: 4 tokens, 2 layers\n")
    assert answer.stderr == "a0 records\n"
    with np.load(out, allow_pickle=False) as trace:
        assert sorted(trace) == ["num_experts", "topk"]
        assert int(trace["num_experts"]) == 99
        assert (trace["topk"].dtype, trace["topk"].shape) == (np.int16, (2, 4, 2))
        assert trace["topk"][:, 3].tolist() == [[50, 51], [52, 53]]
    assert list(tmp_path.iterdir()) == [out]
    told = json.loads(call("record", "--out", str(out), "--tokens", "4", "--json").stdout)
    assert told == {"file": str(out), "tokens": 4, "layers": [0, 5]}


@pytest.mark.parametrize(("failure", "stderr"), [
    (grpc.StatusCode.UNAVAILABLE, "warning: the recording broke off: the reason\n"),
    (grpc.StatusCode.DEADLINE_EXCEEDED, ""),
])  # fmt: skip
def test_what_was_recorded_is_kept(stub: StubBalancer, tmp_path: Path, failure: grpc.StatusCode, stderr: str) -> None:
    stub.parts, stub.failure = [part(0, 3)], failure
    out = tmp_path / "trace.npz"
    answer = call("record", "--out", str(out), "--tokens", "4")
    assert (answer.exit_code, answer.stdout, answer.stderr) == (0, f"{out}: 3 of 4 tokens, 2 layers\n", stderr)


def test_nothing_recorded_is_an_error(stub: StubBalancer, tmp_path: Path) -> None:
    stub.failure = grpc.StatusCode.DEADLINE_EXCEEDED
    answer = call("record", "--out", str(tmp_path / "trace.npz"))
    assert answer.exit_code == 1
    assert "no token came within the time; send requests meanwhile" in answer.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["trace", "missing/trace.npz", "folder.npz"])
def test_a_place_that_cannot_keep_the_trace_is_refused_at_once(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    answer = call("record", "--out", str(tmp_path / name))
    assert isinstance(answer.exception, UserError)
    assert not isinstance(answer.exception, typer.Exit)
