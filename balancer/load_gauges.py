"""The quality of the placement as gauges: aggregates over layers of what ``GetLoads`` tells of each."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.balancer.routing import RoutingDesk
from expertmesh.mesh.telemetry import Gauge, Metrics

INTERVAL_S = 1.0
"""Nobody scrapes more often, and a model of many layers takes some milliseconds."""


class LoadGauges:
    """Call ``update`` whenever something may have changed; ``now`` is monotonic seconds."""

    def __init__(self, routing: RoutingDesk, metrics: Metrics) -> None:
        self._routing = routing
        self._metrics = metrics
        self._shown: int | None = None  # version of the statistics
        self._next_s = 0.0

    def update(self, now: float) -> None:
        version = self._routing.statistics_version
        if version == self._shown or now < self._next_s:
            return
        self._shown, self._next_s = version, now + INTERVAL_S
        layers = [layer for layer in self._routing.loads().layers if layer.tokens]
        _show(self._metrics.balancer_balancedness, [layer.balancedness for layer in layers])
        # No token has been counted yet under a placement that is new.
        known = [layer for layer in layers if layer.fanout_ranks]
        _show(self._metrics.balancer_fanout_ranks, [layer.fanout_ranks for layer in known])
        _show(self._metrics.balancer_fanout_nodes, [layer.fanout_nodes for layer in known])


def _show(gauge: Gauge, values: Sequence[float]) -> None:
    if values:
        gauge.set(sum(values) / len(values), over="mean")
        gauge.set(min(values), over="min")
        gauge.set(max(values), over="max")
