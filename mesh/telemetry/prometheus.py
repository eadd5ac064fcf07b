"""``/metrics`` for Prometheus: text or OpenMetrics, as the scraper asks. Imported only when the endpoint is on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from http.server import ThreadingHTTPServer
from itertools import accumulate

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry import instruments
from expertmesh.mesh.telemetry.instruments import Counter, Distribution, Gauge
from expertmesh.mesh.telemetry.metrics import Metrics

_SHUTDOWN_POLL_S = 0.1


class MetricsCollector(Collector):
    """Shows the cells of ``Metrics`` to a prometheus_client registry at each scrape."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        for declared, family, shared in self._metrics.families():
            names = (*shared, *declared.labels)
            metric: Metric
            if declared.kind is Counter:
                metric = counter = CounterMetricFamily(declared.name, declared.help, labels=names)
                for labels, cell in family.series():
                    counter.add_metric((*shared.values(), *labels.values()), cell.read())
            elif declared.kind is Gauge:
                metric = gauge = GaugeMetricFamily(declared.name, declared.help, labels=names)
                for labels, cell in family.series():
                    gauge.add_metric((*shared.values(), *labels.values()), cell.read())
            else:
                metric = histogram = HistogramMetricFamily(declared.name, declared.help, labels=names)
                for labels, cell in family.series():
                    seen = cell.read()
                    histogram.add_metric((*shared.values(), *labels.values()), _cumulative(seen), seen.sum)
            if metric.samples:
                yield metric


def _cumulative(seen: Distribution) -> list[tuple[str, float] | tuple[str, float, Exemplar]]:
    bounds = [*(str(bound) for bound in seen.bounds), "+Inf"]
    buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
    for bound, count, exemplar in zip(bounds, accumulate(seen.counts), seen.exemplars, strict=True):
        buckets.append((bound, count) if exemplar is None else (bound, count, _exemplar(exemplar)))
    return buckets


def _exemplar(seen: instruments.Exemplar) -> Exemplar:
    """Shown in OpenMetrics only: Prometheus's older text format has no place for it."""
    return Exemplar({"trace_id": seen.trace_id, "span_id": seen.span_id}, seen.value, seen.unix_s)


# prometheus_client writes the colon of `vllm:` as an underscore in OpenMetrics, unless names need no escaping.
_OPENMETRICS = "application/openmetrics-text"
_UNESCAPED = f"{_OPENMETRICS};version=1.0.0;escaping=allow-utf-8"


class _Handler(MetricsHandler):
    timeout = 10
    """Seconds after which a client that sends or reads nothing loses its thread."""

    def do_GET(self) -> None:
        if _OPENMETRICS in self.headers.get("Accept", ""):
            self.headers.replace_header("Accept", _UNESCAPED)
        super().do_GET()


class _Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        """Without http.server's reverse look-up of the host's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class MetricsEndpoint:
    """Serves until ``close``.

    Raises:
        UserError: the address cannot be bound.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        registry = CollectorRegistry()
        registry.register(MetricsCollector(metrics))
        handler = type("Handler", (_Handler,), {"registry": registry})
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            server_type = type("Server", (_Server,), {"address_family": family})
            self._server = server_type(address, handler)
        except OSError as error:
            raise UserError(
                "telemetry.metrics_port",
                f"{host}:{port} cannot be bound ({error})",
                "choose a free port (0 = any), or leave it out to do without /metrics",
            ) from None
        host = f"[{host}]" if ":" in host else host
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_SHUTDOWN_POLL_S,), name="metrics-endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
