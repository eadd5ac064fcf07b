"""``expertmesh top``: what two looks at a balancer make of its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from rich.console import Console

from expertmesh.cli.top import Top
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2


class FakeStub:
    """Answers with what a test put there."""

    def __init__(self) -> None:
        self.status = admin_pb2.GetStatusResponse(view_number=3, serving=True, balancer_mode="online")
        self.loads = admin_pb2.GetLoadsResponse()

    async def GetStatus(self, request: Any, timeout: float) -> admin_pb2.GetStatusResponse:
        copy = admin_pb2.GetStatusResponse()
        copy.CopyFrom(self.status)
        return copy

    async def GetLoads(self, request: Any, timeout: float) -> admin_pb2.GetLoadsResponse:
        return self.loads

    async def ListEvents(self, request: Any, timeout: float) -> AsyncIterator[admin_pb2.ListEventsResponse]:
        yield admin_pb2.ListEventsResponse(number=1, unix_s=1.0, kind="view_serving", subject="view 3", message="ready")

    def server(self, server_id: str, role: mesh_pb2.Role.ValueType, incarnation: str = "1", **load: Any) -> None:
        for server in self.status.servers:
            if server.server_id == server_id:
                self.status.servers.remove(server)
        self.status.servers.add(
            server_id=server_id,
            incarnation=incarnation,
            role=role,
            state=mesh_pb2.SERVER_STATE_SERVING,
            load=mesh_pb2.ServerLoad(**load) if load else None,
        )


@pytest.fixture
def stub() -> FakeStub:
    return FakeStub()


def make_top(stub: FakeStub, *moments: float) -> Top:
    times = iter(moments)
    return Top(cast(admin_pb2_grpc.AdminServiceStub, stub), lambda: next(times))


async def test_rates_are_what_counters_grew_by(stub: FakeStub) -> None:
    top = make_top(stub, 10.0, 12.0)
    stub.server("attention-0", mesh_pb2.ROLE_ATTENTION, generation_tokens=100, prompt_tokens=50)
    stub.server("router-0", mesh_pb2.ROLE_ROUTER, requests_ended=5, requests_failed=1)
    await top.look()
    assert top.as_dict()["rates"]["generation_tokens_per_s"] is None, "one look knows no rates"
    stub.server("attention-0", mesh_pb2.ROLE_ATTENTION, generation_tokens=300, prompt_tokens=50, token_s=0.02)
    stub.server("router-0", mesh_pb2.ROLE_ROUTER, requests_ended=9, requests_failed=2, ttft_s=0.5)
    await top.look()
    shown = top.as_dict()
    assert shown["rates"] == {
        "requests_per_s": 2.0,
        "failed_per_s": 0.5,
        "prompt_tokens_per_s": 0.0,
        "generation_tokens_per_s": 100.0,
    }
    assert (shown["ttft_s"], shown["tpot_s"]) == (0.5, 0.02)


async def test_a_server_that_was_restarted_counts_from_zero(stub: FakeStub) -> None:
    top = make_top(stub, 1.0, 2.0)
    stub.server("attention-0", mesh_pb2.ROLE_ATTENTION, generation_tokens=1000)
    await top.look()
    stub.server("attention-0", mesh_pb2.ROLE_ATTENTION, incarnation="2", generation_tokens=30)
    await top.look()
    assert top.as_dict()["rates"]["generation_tokens_per_s"] == 30.0


async def test_load_and_balancedness(stub: FakeStub) -> None:
    top = make_top(stub, 1.0)
    for server_id in ("expert-0", "expert-1"):
        stub.server(server_id, mesh_pb2.ROLE_EXPERT)
    stub.loads.expert_servers.extend(["expert-0", "expert-1"])
    stub.loads.layers.add(layer=0, balancedness=0.5, tokens=10, rank_load=[30, 10], fanout_ranks=1.5)
    stub.loads.layers.add(layer=1, balancedness=1.0, tokens=10, rank_load=[30, 10], fanout_ranks=2.5)
    await top.look()
    shown = top.as_dict()
    assert shown["balancedness"] == {"mean": 0.75, "min": 0.5, "max": 1.0}
    assert shown["fanout_ranks"]["mean"] == 2.0
    assert [server["load"] for server in shown["servers"]] == [1.5, 0.5]


async def test_people_see_it_in_lines(stub: FakeStub) -> None:
    top = make_top(stub, 1.0, 2.0)
    stub.server("attention-0", mesh_pb2.ROLE_ATTENTION, num_requests_running=3, kv_cache_usage=0.25, token_s=0.01)
    stub.server("expert-0", mesh_pb2.ROLE_EXPERT)
    await top.look()
    await top.look()
    console = Console(width=160, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(top.as_table())
    text = captured.get()
    for wanted in ("view 3, serving", "3 running", "TPOT 10.0 ms", "KV cache 25%", "view_serving view 3: ready"):
        assert wanted in text
