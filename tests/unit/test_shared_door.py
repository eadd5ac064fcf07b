"""Ports that several routers share: held before they start, joined by them alone."""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Sequence
from contextlib import closing

import grpc
import pytest

from expertmesh.cli.local_plan import planned_services
from expertmesh.cli.shared_door import SharedDoor
from expertmesh.mesh.addresses import split_host_port
from expertmesh.mesh.config import RouterConfig, TlsConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.http_server import HttpServer
from expertmesh.mesh.rpc import RpcServer, open_channel, start_server
from expertmesh.mesh.telemetry import disabled_telemetry
from support.rpc_stand import health_of

HOST = "127.0.0.1"
TIMEOUT_S = 10.0
NOBODY = 65534


def config(port: int = 0, http: bool = False, http_port: int = 0) -> RouterConfig:
    section = {"servers": 2, "port": port, "http": {"enabled": http, "port": http_port}}
    return parse_config({"router": section}).router


def port_of(door: SharedDoor) -> int:
    return split_host_port(door.address)[1]


def try_to_bind(port: int, *options: int) -> None:
    with socket.socket() as stranger:
        for option in options:
            stranger.setsockopt(socket.SOL_SOCKET, option, 1)
        stranger.bind((HOST, port))


def test_a_local_mesh_has_as_many_routers_as_it_is_told() -> None:
    planned = planned_services(parse_config({"router": {"servers": 3}}))
    assert [server_id for role, server_id in planned if role == "router"] == ["router-0", "router-1", "router-2"]
    with pytest.raises(UserError, match=r"router\.servers"):
        parse_config({"router": {"servers": 0}})


def test_a_port_is_found_and_kept_from_all_who_do_not_share_it() -> None:
    with closing(SharedDoor(config())) as door:
        assert door.http_address is None
        for options in ((), (socket.SO_REUSEADDR,)):
            with pytest.raises(OSError, match="in use"):
                try_to_bind(port_of(door), *options)
        # Nobody listens yet: who connects is told so at once, and does not wait for a door that is only held.
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port_of(door)), TIMEOUT_S).close()
        try_to_bind(port_of(door), socket.SO_REUSEPORT)


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root to be another user for a moment")
def test_another_user_cannot_join() -> None:
    libc = ctypes.CDLL(None)  # the user that a socket belongs to is the thread's, for files
    with closing(SharedDoor(config())) as door:
        own = libc.setfsuid(NOBODY)
        try:
            if libc.setfsuid(-1) != NOBODY:
                pytest.skip("this root may not become another user")
            stranger = socket.socket()
        finally:
            libc.setfsuid(own)
        with stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="in use"):
                stranger.bind((HOST, port_of(door)))


def test_the_doors_of_two_meshes_do_not_mix() -> None:
    with closing(SharedDoor(config())) as door:
        port = port_of(door)
        with pytest.raises(UserError, match=rf"router\.port: 127\.0\.0\.1:{port} cannot be bound"):
            SharedDoor(config(port))
        with pytest.raises(UserError, match=rf"router\.http\.port: 127\.0\.0\.1:{port} cannot be bound"):
            SharedDoor(config(http=True, http_port=port))


def test_http_has_a_port_of_its_own() -> None:
    with closing(SharedDoor(config(http=True))) as door:
        assert door.http_address is not None
        ports = {port_of(door), split_host_port(door.http_address)[1]}
        assert len(ports) == 2
        for port in ports:
            with pytest.raises(OSError, match="in use"):
                try_to_bind(port)


def test_an_address_of_another_machine_is_a_user_error() -> None:
    section = parse_config({"router": {"servers": 2, "host": "203.0.113.1"}}).router
    with pytest.raises(UserError, match=r"router\.port: 203\.0\.113\.1:0 cannot be bound"):
        SharedDoor(section)


def test_connections_of_a_server_that_is_gone_are_not_in_the_way() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((HOST, port), TIMEOUT_S) as client:
            served, _ = server.accept()
            served.close()  # first, so that it is this side that waits for what may still be under way
            assert client.recv(1) == b""
    with pytest.raises(OSError, match="in use"):
        try_to_bind(port)
    with closing(SharedDoor(config(port))) as door:
        assert port_of(door) == port
        for options in ((), (socket.SO_REUSEADDR,)):
            with pytest.raises(OSError, match="in use"):
                try_to_bind(port, *options)
        with pytest.raises(UserError):
            SharedDoor(config(port))


async def rpc_server(port: int, *, share_port: bool) -> RpcServer:
    def register(server: grpc.aio.Server) -> Sequence[str]:
        return ()

    return await start_server(
        host=HOST,
        port=port,
        share_port=share_port,
        tls=TlsConfig(),
        register=register,
        telemetry=disabled_telemetry(),
        key="router.port",
    )


async def test_grpc_servers_share_a_port_that_they_are_told_to_share() -> None:
    with closing(SharedDoor(config())) as door:
        servers = [await rpc_server(port_of(door), share_port=True) for _ in range(2)]
        with pytest.raises(UserError, match=r"router\.port"):
            await rpc_server(port_of(door), share_port=False)
        assert {server.address for server in servers} == {door.address}
        await servers[0].stop(0)
        async with open_channel(door.address, TlsConfig()) as channel:
            assert await health_of(channel)
        await servers[1].stop(0)


def http_server(port: int, *, share_port: bool) -> HttpServer:
    return HttpServer(None, host=HOST, port=port, key="router.http.port", share_port=share_port)


async def test_http_servers_share_a_port_until_they_stop_listening() -> None:
    with closing(SharedDoor(config())) as door:
        first, second = (http_server(port_of(door), share_port=True) for _ in range(2))
        with pytest.raises(UserError, match=r"router\.http\.port"):
            http_server(port_of(door), share_port=False)
        await first.start()
        await second.start()
        first.stop_listening()
        for _ in range(20):  # the one that is left gets them all
            socket.create_connection((HOST, port_of(door)), TIMEOUT_S).close()
        second.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port_of(door)), TIMEOUT_S).close()
        await first.stop()
        await second.stop()
