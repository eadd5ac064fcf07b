"""What a running mesh says about itself: metrics, the balancer's status and events, whether everything is there."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import grpc
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.addresses import split_addresses
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.leader import find_leader
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2

_POLL_S = 0.1
_HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


class HasLogs(Protocol):
    """A mesh that runs."""

    @property
    def state_dir(self) -> Path: ...


def metrics(mesh: HasLogs, server_id: str, **labels: str) -> dict[str, float]:
    """What a service's /metrics says now, summed over the series that have these labels."""
    with urllib.request.urlopen(f"http://{metrics_address(mesh, server_id)}/metrics", timeout=10) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def weights_that_came(mesh: HasLogs, ranks: Sequence[str]) -> dict[str, tuple[float, float]]:
    """How weights came to these expert ranks from others: by transport the bytes, and the seconds that the experts took
    one by one; those by which none came are left out."""
    names = ("expertmesh_migration_peer_bytes_total", "expertmesh_migration_peer_seconds_total")
    found = {}
    for transport in ("tcp", "nixl"):
        values = [metrics(mesh, rank, transport=transport) for rank in ranks]
        found[transport] = sum(of[names[0]] for of in values), sum(of[names[1]] for of in values)
    return {transport: came for transport, came in found.items() if came[0]}


def metrics_address(mesh: HasLogs, server_id: str) -> str:
    """``host:port`` of a service's /metrics."""
    log = (mesh.state_dir / f"{server_id}.log").read_text(encoding="utf-8", errors="replace")
    return str(re.findall(r"metrics on http://(\S+)/metrics", log)[-1])


async def leader(mesh: LocalMesh, timeout_s: float = 10.0) -> str | None:
    """The address of the balancer that leads, or is the only one."""
    return await find_leader(split_addresses(mesh.balancer), TlsConfig(), timeout_s)


@asynccontextmanager
async def _admin(mesh: LocalMesh, timeout_s: float = 10.0) -> AsyncIterator[admin_pb2_grpc.AdminServiceStub]:
    address = await leader(mesh, timeout_s)
    assert address is not None, f"none of {mesh.balancer} leads"
    async with rpc.open_channel(address, TlsConfig()) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


async def status(mesh: LocalMesh, timeout_s: float = 10.0) -> admin_pb2.GetStatusResponse:
    async with _admin(mesh, timeout_s) as stub:
        return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s, wait_for_ready=True)


async def events(mesh: LocalMesh) -> list[admin_pb2.ListEventsResponse]:
    """Every event that the balancer keeps, oldest first."""
    async with _admin(mesh) as stub:
        return [event async for event in stub.ListEvents(admin_pb2.ListEventsRequest(), timeout=10)]


def rank_ids(mesh: LocalMesh, roles: Iterable[str] = ("attention", "both", "expert")) -> list[str]:
    return [server.id for server in mesh.servers.values() if server.role in roles]


async def stepping(mesh: LocalMesh) -> dict[str, str] | None:
    """Server id → incarnation when every process runs and every rank steps in the current view; else None."""
    if any(server.pid is None for server in mesh.servers.values()):
        return None
    found = await members(mesh)
    return found if set(found) == set(rank_ids(mesh)) else None


async def members(mesh: LocalMesh, timeout_s: float = 10.0) -> dict[str, str]:
    """Server id → incarnation of the running ranks that step in the current view; empty while nothing serves or the
    balancer does not answer."""
    try:
        answer = await status(mesh, timeout_s)
    except grpc.aio.AioRpcError:
        return {}
    if not answer.serving:
        return {}
    pids = {server.id: server.pid for server in mesh.servers.values()}
    return {
        server.server_id: server.incarnation
        for server in answer.servers
        if server.HasField("rank")
        and server.state == mesh_pb2.SERVER_STATE_SERVING
        and server.pid == pids.get(server.server_id)
    }


async def until_idle(mesh: LocalMesh, timeout_s: float) -> None:
    """Until no attention server holds a request or a KV block."""
    held: dict[str, tuple[float, ...]] = {}

    async def is_idle() -> bool:
        for server_id in rank_ids(mesh, ("attention", "both")):
            values = await asyncio.to_thread(metrics, mesh, server_id)
            held[server_id] = tuple(values[name] for name in _HELD)
        return not any(any(figures) for figures in held.values())

    await until(is_idle, timeout_s, lambda: f"running, waiting, KV usage do not come to 0: {held}")


async def until(
    condition: Callable[[], Awaitable[bool]],
    timeout_s: float,
    otherwise: Callable[[], str],
    poll_s: float = _POLL_S,
) -> None:
    """Ask until ``condition`` holds; fail with ``otherwise()`` when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {otherwise()}"
        await asyncio.sleep(poll_s)


async def swap_two_experts(mesh: LocalMesh, timeout_s: float = 30.0) -> None:
    """A migration, until it is committed: the first slots of the first two expert servers change their experts in
    layer 0."""
    async with _admin(mesh) as stub:
        request = admin_pb2.GetPlacementRequest(layers=[0])
        now = await stub.GetPlacement(request, timeout=10)
        (layer,), servers = now.layers, list(now.slot_servers)
        other = next(slot for slot, server in enumerate(servers) if server != servers[0])
        slots = list(layer.slots)
        slots[0], slots[other] = slots[other], slots[0]
        wanted = mesh_pb2.LayerPlacement(layer=0, version=layer.version, slots=slots)
        await stub.Apply(admin_pb2.ApplyRequest(view_number=now.view_number, layers=[wanted]), timeout=10)

        async def is_committed() -> bool:
            answer = await stub.GetPlacement(request, timeout=10)
            return list(answer.layers[0].slots) == slots

        await until(is_committed, timeout_s, lambda: "the migration is not committed")
