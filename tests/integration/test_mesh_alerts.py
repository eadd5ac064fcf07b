"""Alerts of a real Prometheus over a live mesh: they are raised by what they are about, and end when it is mended.

The rules are those of deploy/dashboards, generated with limits of seconds where those for people have hours.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support import mesh_state
from support.dashboards import generator
from support.live_mesh import LiveMesh
from support.mesh import kept_down
from support.prometheus import Prometheus, needs, running_prometheus

pytestmark = [pytest.mark.slow, needs("prometheus")]

ALERT_TIMEOUT_S = 90.0
VICTIM = "expert-2"
TOO_SHORT_S = 0.3  # for a request of a thousand tokens
NUM_CLIENTS = 2
WINDOW_S = 20
PENDING_S = 2


def short_rules(folder: Path) -> Path:
    """Alerts within seconds, each of them pending first; other limits are as they are."""
    alerts = generator().alerts
    burn = alerts.Burn(long_s=WINDOW_S, short_s=WINDOW_S // 2, factor=14.4, for_s=PENDING_S)
    limits = alerts.Limits(fast=burn, missing_for_s=PENDING_S)
    path = folder / "alerts.yaml"
    path.write_text(generator().render_rules(limits), encoding="utf-8")
    return path


async def test_alerts_fire_and_end(live: LiveMesh, tmp_path: Path) -> None:
    targets = [mesh_state.metrics_address(live.mesh, server) for server in live.mesh.servers]
    with running_prometheus(tmp_path, targets, short_rules(tmp_path)) as prometheus:
        missing, burning = "ExpertmeshServersMissing", "ExpertmeshObjectiveBurnsFast"
        await until_evaluated(prometheus)
        assert not prometheus.alerts(missing)
        assert not prometheus.alerts(burning)
        with kept_down(live.mesh, VICTIM):
            async with late_requests(live):
                await asyncio.gather(fires(prometheus, missing), fires(prometheus, burning))
            (alert,) = prometheus.alerts(missing)
            assert alert["labels"]["server_role"] == "expert"
            assert alert["annotations"]["summary"] == "1 expert servers are not there that should be"
        await asyncio.gather(ends(prometheus, missing), ends(prometheus, burning))
        for name in (missing, burning):
            assert was_pending(prometheus, name), f"{name} was fired at once"
    await mesh_state.until(live.is_whole, ALERT_TIMEOUT_S, lambda: f"{VICTIM} does not come back")


@contextlib.asynccontextmanager
async def late_requests(live: LiveMesh) -> AsyncIterator[None]:
    """As long as the block runs clients ask for more tokens than there is time for: nobody's objective is met."""
    async with rpc.open_channel(live.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)

        async def ask(seed: int) -> None:
            while True:
                request = build_request([7, seed], max_tokens=1000, ignore_eos=True, seed=seed)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.GenerateUnary(request, timeout=TOO_SHORT_S)
                    raise AssertionError(f"all tokens came in {TOO_SHORT_S} s")

        clients = [asyncio.create_task(ask(seed)) for seed in range(1, NUM_CLIENTS + 1)]
        try:
            yield
        finally:
            for client in clients:
                client.cancel()
            ended = await asyncio.gather(*clients, return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


async def until_evaluated(prometheus: Prometheus) -> None:
    """Until every rule has been, and there is something to evaluate."""

    async def is_evaluated() -> bool:
        groups = (await asyncio.to_thread(prometheus.get, "rules"))["groups"]
        healthy = all(rule["health"] == "ok" for group in groups for rule in group["rules"])
        known = await asyncio.to_thread(prometheus.query, "expertmesh_balancer_servers_missing")
        return healthy and bool(known) and not any(known)

    await mesh_state.until(is_evaluated, ALERT_TIMEOUT_S, lambda: str(prometheus.get("rules")))


async def fires(prometheus: Prometheus, name: str) -> None:
    async def is_firing() -> bool:
        alerts = await asyncio.to_thread(prometheus.alerts, name)
        return any(alert["state"] == "firing" for alert in alerts)

    await mesh_state.until(is_firing, ALERT_TIMEOUT_S, lambda: f"{name} does not fire: {prometheus.get('alerts')}")


async def ends(prometheus: Prometheus, name: str) -> None:
    async def is_over() -> bool:
        return not await asyncio.to_thread(prometheus.alerts, name)

    await mesh_state.until(is_over, ALERT_TIMEOUT_S, lambda: f"{name} does not end: {prometheus.get('alerts')}")


def was_pending(prometheus: Prometheus, name: str) -> bool:
    """Looked up afterwards, in the series that Prometheus keeps of alerts: nobody has to look at the right moment."""
    return bool(prometheus.query(f'count_over_time(ALERTS{{alertname="{name}",alertstate="pending"}}[10m])'))
