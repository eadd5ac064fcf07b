"""The quality of the placement as gauges: aggregates over layers of what ``GetLoads`` tells of each."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.balancer.routing import RoutingDesk
from expertmesh.mesh.telemetry import Gauge, Metrics
from expertmesh.v1 import admin_pb2

INTERVAL_S = 1.0
"""Nobody scrapes more often, and a model of many layers takes some milliseconds."""


class LoadGauges:
    """Call ``update`` whenever something may have changed; ``now`` is monotonic seconds."""

    def __init__(self, routing: RoutingDesk, metrics: Metrics) -> None:
        self._routing = routing
        self._metrics = metrics
        self._shown: int | None = None  # version of the statistics
        self._next_s = 0.0
        self._ranks_shown: set[str] = set()

    def update(self, now: float) -> None:
        version = self._routing.statistics_version
        if version == self._shown or now < self._next_s:
            return
        self._shown, self._next_s = version, now + INTERVAL_S
        loads = self._routing.loads()
        layers = [layer for layer in loads.layers if layer.tokens]
        self._show_ranks(loads.expert_servers, layers)
        _show(self._metrics.balancer_balancedness, [layer.balancedness for layer in layers])
        # No token has been counted yet under a placement that is new.
        known = [layer for layer in layers if layer.fanout_ranks]
        _show(self._metrics.balancer_fanout_ranks, [layer.fanout_ranks for layer in known])
        _show(self._metrics.balancer_fanout_nodes, [layer.fanout_nodes for layer in known])

    def _show_ranks(self, servers: Sequence[str], layers: Sequence[admin_pb2.LayerLoads]) -> None:
        totals = [sum(layer.rank_load[index] for layer in layers) for index in range(len(servers))]
        mean = sum(totals) / max(len(totals), 1)
        for server, total in zip(servers, totals, strict=True):
            self._metrics.balancer_rank_load.set(total / mean if mean else 0.0, expert_server=server)
        for server in self._ranks_shown.difference(servers):
            self._metrics.balancer_rank_load.set(0.0, expert_server=server)
        self._ranks_shown.update(servers)


def _show(gauge: Gauge, values: Sequence[float]) -> None:
    if values:
        gauge.set(sum(values) / len(values), over="mean")
        gauge.set(min(values), over="min")
        gauge.set(max(values), over="max")
