"""A real Prometheus over a live mesh: every panel of the dashboards and every alert finds its data."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Iterable
from pathlib import Path

import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support import mesh_state
from support.dashboards import RULES, operands, panel_queries, rules
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S
from support.prometheus import Prometheus, needs, running_prometheus

pytestmark = [pytest.mark.slow, needs("prometheus")]

RATE_INTERVAL = "1m"
DATA_TIMEOUT_S = 45.0
# 0 / 0 while no view has changed under Prometheus's eyes, which this test does not make happen.
MAY_BE_NAN = "Time of a view change"


async def test_every_panel_and_every_alert_has_data(live: LiveMesh, tmp_path: Path) -> None:
    targets = [mesh_state.metrics_address(live.mesh, server) for server in live.mesh.servers]
    with running_prometheus(tmp_path, targets, RULES) as prometheus:
        await scraped(prometheus, len(targets))
        sampled = secrets.token_hex(16)
        await generate(live, f"00-{sampled}-{secrets.token_hex(8)}-01")
        await mesh_state.swap_two_experts(live.mesh)
        await generate(live, "")
        queries = panel_queries(RATE_INTERVAL)
        alerts = [rule for rule in rules() if "alert" in rule]
        queries |= {f"{rule['alert']}: {part}": part for rule in alerts for part in operands(rule["expr"])}
        await all_answered(prometheus, queries)
        await all_evaluated(prometheus)
        await leads_to_the_trace(prometheus, sampled)


async def generate(live: LiveMesh, traceparent: str) -> None:
    """A few requests at a time, so that their tokens share steps; all belong to the same trace."""
    async with rpc.open_channel(live.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)

        async def run(seed: int) -> None:
            request = build_request([7, seed], max_tokens=8, ignore_eos=True, seed=seed)
            metadata = (("traceparent", traceparent),) if traceparent else ()
            async for _ in stub.Generate(request, metadata=metadata, timeout=REQUEST_TIMEOUT_S):
                pass

        await asyncio.gather(*(run(seed) for seed in range(1, 5)))


async def scraped(prometheus: Prometheus, num_targets: int) -> None:
    async def is_up() -> bool:
        return await asyncio.to_thread(prometheus.query, "up") == [1.0] * num_targets

    await mesh_state.until(is_up, DATA_TIMEOUT_S, lambda: str(prometheus.get("targets")["activeTargets"]))


async def all_answered(prometheus: Prometheus, queries: dict[str, str]) -> None:
    """Until each query has data, and a number where the mesh has done what it is about."""
    missing = dict(queries)

    def ask() -> None:
        for name, expr in list(missing.items()):
            if has_data(prometheus.query(expr), may_be_nan=MAY_BE_NAN in name):
                del missing[name]

    async def is_answered() -> bool:
        await asyncio.to_thread(ask)
        return not missing

    await mesh_state.until(is_answered, DATA_TIMEOUT_S, lambda: f"no data: {missing}", poll_s=1.0)


def has_data(values: Iterable[float], *, may_be_nan: bool) -> bool:
    return any(may_be_nan or not math.isnan(value) for value in values)


async def all_evaluated(prometheus: Prometheus) -> None:
    """Prometheus has evaluated every rule, without an error."""
    expected = {rule.get("alert") or rule["record"] for rule in rules()}

    async def is_evaluated() -> bool:
        groups = (await asyncio.to_thread(prometheus.get, "rules"))["groups"]
        return {rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "ok"} == expected

    await mesh_state.until(is_evaluated, DATA_TIMEOUT_S, lambda: str(prometheus.get("rules")))


async def leads_to_the_trace(prometheus: Prometheus, trace_id: str) -> None:
    """A bucket of the router's latencies names the request that was sampled."""
    selector = 'vllm:time_to_first_token_seconds_bucket{role="router"}'

    async def is_known() -> bool:
        window = {"start": "0", "end": "4102444800"}
        found = await asyncio.to_thread(lambda: prometheus.get("query_exemplars", query=selector, **window))
        return trace_id in {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}

    await mesh_state.until(is_known, DATA_TIMEOUT_S, lambda: f"no exemplar of trace {trace_id}")
