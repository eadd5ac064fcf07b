"""``expertmesh ranks``: two ranks of a machine under one process, on the ports that were asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
import pytest
import yaml

from expertmesh.cli.next_ports import with_next_ports
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig, TlsConfig, parse_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.meet import bind_listener
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.etcd import free_ports
from support.mesh_state import until

TIMEOUT_S = 60.0


def test_each_rank_has_the_next_ports() -> None:
    set_ports = {"attention": {"port": 50052}, "dataplane": {"port": 50100}, "disaggregation": {"port": 50200}}
    third = with_next_ports(parse_config(set_ports), 2)
    assert (third.attention.port, third.dataplane.port, third.disaggregation.port) == (50054, 50102, 50202)
    assert third.expert.port == 0, "any free one stays any free one"
    assert third.telemetry.metrics_port is None
    with pytest.raises(UserError, match=r"attention\.port"):
        with_next_ports(parse_config({"attention": {"port": 65535}}), 1)


def test_a_port_that_is_taken_is_named() -> None:
    taken = bind_listener("127.0.0.1")
    with taken, pytest.raises(UserError, match=r"dataplane\.port: \d+ on 127.0.0.1 cannot be bound"):
        bind_listener("127.0.0.1", taken.getsockname()[1])


@pytest.mark.slow
async def test_ranks_come_back_and_leave(tmp_path: Path) -> None:
    balancer_port, rank_port = free_ports(1)[0], consecutive_ports()
    config = {
        "both_servers": 2,
        "attention": {"servers": 0, "port": rank_port},
        "expert": {"servers": 0},
        "balancer": {"port": balancer_port, "state_dir": str(tmp_path / "state")},
    }
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    options = ["--config", str(file), "--host", "127.0.0.1"]
    pod = ["ranks", "both", "--count", "2", "--id", "pod-7", "--node", "n1", *options]
    async with rpc.open_channel(f"127.0.0.1:{balancer_port}", TlsConfig()) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        with running(tmp_path, ["serve", "balancer", *options]), running(tmp_path, pod) as ranks:
            servers = await both_serve(stub, tmp_path)
            assert {s.server_id: s.address for s in servers} == {
                f"pod-7-{index}": f"127.0.0.1:{rank_port + index}" for index in range(2)
            }
            assert {s.node for s in servers} == {"n1"}

            killed, other = (server.pid for server in sorted(servers, key=lambda server: server.server_id))
            psutil.Process(killed).kill()
            again = {server.server_id: server.pid for server in await both_serve(stub, tmp_path, without=killed)}
            assert again["pod-7-1"] == other, "it went on"

            children = psutil.Process(ranks.pid).children()
            ranks.send_signal(signal.SIGTERM)
            assert ranks.wait(TIMEOUT_S) == 0
            assert not psutil.wait_procs(children, 5)[1]


async def both_serve(
    stub: admin_pb2_grpc.AdminServiceStub, folder: Path, without: int = 0
) -> list[admin_pb2.ServerStatus]:
    """The two servers, once they serve and none has the pid ``without``."""
    found: list[admin_pb2.ServerStatus] = []

    async def they_do() -> bool:
        try:
            status = await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=5, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
        serving = [s for s in status.servers if s.state == mesh_pb2.SERVER_STATE_SERVING and s.pid != without]
        found[:] = serving
        return status.serving and len(serving) == 2

    await until(they_do, TIMEOUT_S, lambda: f"{found}\n{(folder / 'ranks.log').read_text()}")
    return found


@contextmanager
def running(folder: Path, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments]
    with (folder / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def consecutive_ports() -> int:
    """The first of two free ports."""
    while True:
        (port,) = free_ports(1)
        try:
            bind_listener("127.0.0.1", port + 1).close()
        except (UserError, OverflowError):
            continue
        return port


def test_defaults_are_any_port() -> None:
    config = MeshConfig()
    assert (config.attention.port, config.expert.port, config.dataplane.port) == (0, 0, 0)
