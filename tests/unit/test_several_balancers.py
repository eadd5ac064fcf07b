"""What the configuration and the command line say of several balancers, and how servers find the one that leads."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.balancer.turns import seen_from_afar
from expertmesh.cli.addresses import balancer_address
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.local_plan import planned_services
from expertmesh.cli.state_dir import StateDir
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.config import TlsConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.leader import find_leader
from expertmesh.mesh.membership import MembershipClient
from expertmesh.mesh.rpc import RpcServer, start_server
from expertmesh.mesh.telemetry import disabled_telemetry
from expertmesh.v1 import mesh_pb2, mesh_pb2_grpc

TIMEOUT_S = 20.0


@pytest.mark.parametrize(
    ("balancer", "blamed"),
    [
        ({"servers": 2}, r"balancer: .*servers is 2 and state is file, .*set state: etcd"),
        ({"state": "consul"}, r"balancer\.state: .*'file' or 'etcd'"),
        ({"address": "a:1,b"}, r"balancer: .*address: 'b' is not HOST:PORT"),
        ({"etcd": {"endpoints": ["http://a:1"]}}, r"balancer\.etcd: .*endpoints: 'http://a:1' is not HOST:PORT"),
        ({"etcd": {"endpoints": ["a"]}}, r"balancer\.etcd: .*endpoints: 'a' is not HOST:PORT"),
        ({"etcd": {"endpoints": []}}, r"balancer\.etcd\.endpoints"),
        ({"etcd": {"prefix": "mesh"}}, r"balancer\.etcd\.prefix"),
        ({"etcd": {"lease_s": 1}}, r"balancer\.etcd\.lease_s"),
        ({"etcd": {"cert_file": "c"}}, r"balancer\.etcd: .*cert_file and key_file go together"),
        ({"etcd": {"cert_file": "c", "key_file": "k"}}, r"balancer\.etcd: .*ca_file is not"),
        ({"etcd": {"password_file": "p"}}, r"balancer\.etcd: .*user is not"),
    ],
)
def test_a_wrong_key_is_named(balancer: dict[str, Any], blamed: str) -> None:
    with pytest.raises(UserError, match=blamed):
        parse_config({"balancer": balancer})


def test_addresses_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_addresses("a:1, [::1]:2") == ("a:1", "[::1]:2")
    assert split_addresses("") == ()
    assert balancer_address("a:1,b:2") == "a:1,b:2"
    monkeypatch.setenv("EXPERTMESH_BALANCER", "a:1,b")
    with pytest.raises(UserError, match=r"EXPERTMESH_BALANCER: 'b' is not an address"):
        balancer_address()


def test_a_local_mesh_has_as_many_balancers_as_it_is_told(tmp_path: Path) -> None:
    config = parse_config({"balancer": {"servers": 3, "state": "etcd"}})
    ids = [server_id for role, server_id in planned_services(config) if role == "balancer"]
    assert ids == ["balancer", "balancer-1", "balancer-2"]
    one_port = parse_config({"balancer": {"servers": 3, "state": "etcd", "port": 7}})
    folder = StateDir.claim(tmp_path / "mesh")
    with pytest.raises(UserError, match=r"balancer\.port: the 3 balancers of a local mesh cannot share port 7"):
        LocalMesh(one_port, folder)
    folder.release()


class Balancer(mesh_pb2_grpc.MembershipServiceServicer):
    """Leads, stands by, or says nothing to a registration."""

    def __init__(self, behaviour: str) -> None:
        self.behaviour = behaviour
        self.registered = asyncio.Event()
        self.hang_up = asyncio.Event()

    async def start(self) -> RpcServer:
        def register(server: grpc.aio.Server) -> Sequence[str]:
            mesh_pb2_grpc.add_MembershipServiceServicer_to_server(self, server)
            return (mesh_pb2.DESCRIPTOR.services_by_name["MembershipService"].full_name,)

        server = await start_server(
            host="127.0.0.1", port=0, tls=TlsConfig(), register=register, telemetry=disabled_telemetry()
        )
        server.set_serving(self.behaviour == "leads")
        return server

    async def Join(
        self, request_iterator: AsyncIterator[mesh_pb2.JoinRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[mesh_pb2.JoinResponse]:
        await anext(request_iterator)
        if self.behaviour == "silent":
            await asyncio.sleep(TIMEOUT_S)
        if self.behaviour == "stands by":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "another one leads")
        yield mesh_pb2.JoinResponse(welcome=mesh_pb2.Welcome(heartbeat_s=0.1, lease_s=1.0))
        self.registered.set()
        await self.hang_up.wait()


async def test_a_server_asks_in_turn_until_the_leader_welcomes_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "expertmesh.mesh.membership")
    balancers = [Balancer("stands by"), Balancer("stands by"), Balancer("leads")]
    async with AsyncExitStack() as stack:
        servers = [await balancer.start() for balancer in balancers]
        for server in servers:
            stack.push_async_callback(server.stop, 0.1)
        client = MembershipClient(
            ",".join(server.address for server in servers), mesh_pb2.Registration, lambda message: None, TlsConfig()
        )
        running = asyncio.create_task(client.run())
        try:
            await asyncio.wait_for(balancers[2].registered.wait(), TIMEOUT_S)
            # The leader goes, and another one leads a while later.
            balancers[2].behaviour = "stands by"
            balancers[2].hang_up.set()
            balancers[0].behaviour = "leads"
            await asyncio.wait_for(balancers[0].registered.wait(), TIMEOUT_S)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            balancers[0].hang_up.set()
    told = [record.getMessage() for record in caplog.records if "another one leads" in record.getMessage()]
    assert len(told) <= 5, "every refusal is told again and again"


@pytest.mark.slow
async def test_one_that_says_nothing_is_passed_over() -> None:
    silent, leader = Balancer("silent"), Balancer("leads")
    async with AsyncExitStack() as stack:
        servers = [await balancer.start() for balancer in (silent, leader)]
        for server in servers:
            stack.push_async_callback(server.stop, 0.1)
        addresses = tuple(server.address for server in servers)
        client = MembershipClient(",".join(addresses), mesh_pb2.Registration, lambda message: None, TlsConfig())
        running = asyncio.create_task(client.run())
        try:
            await asyncio.wait_for(leader.registered.wait(), TIMEOUT_S)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            leader.hang_up.set()
        assert await find_leader(addresses, TlsConfig(), TIMEOUT_S) == servers[1].address
        assert await find_leader((addresses[0], "127.0.0.1:1"), TlsConfig(), 0.3) is None


def test_a_balancer_that_listens_everywhere_names_its_machine() -> None:
    assert seen_from_afar("0.0.0.0:7") == f"{socket.gethostname()}:7"
    assert seen_from_afar("[::]:7") == f"{socket.gethostname()}:7"
    assert seen_from_afar("10.0.0.1:7") == "10.0.0.1:7"
