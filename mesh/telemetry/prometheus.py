"""``/metrics`` for Prometheus: text or OpenMetrics, as the scraper asks. Imported only when the endpoint is on."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import sys
import threading
from collections.abc import Iterable
from http.server import ThreadingHTTPServer
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry import instruments
from expertmesh.mesh.telemetry.instruments import Counter, Distribution, Gauge
from expertmesh.mesh.telemetry.metrics import Metrics
from expertmesh.mesh.telemetry.metrics_door import MetricsDoor

log = logging.getLogger(__name__)

_SHUTDOWN_POLL_S = 1.0
"""The server looks so often whether it should stop: each look costs, in every service, for as long as it runs."""
_MAX_CONNECTIONS = 64
"""At a time, each with a thread of its own; further ones are closed."""


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
    door: MetricsDoor | None = None

    def setup(self) -> None:
        super().setup()
        if isinstance(self.request, ssl.SSLSocket):
            self.request.do_handshake()  # here and not where connections are accepted, which it would hold up

    def do_GET(self) -> None:
        if self.door is not None and not self._is_admitted(self.door):
            return
        if _OPENMETRICS in self.headers.get("Accept", ""):
            self.headers.replace_header("Accept", _UNESCAPED)
        super().do_GET()

    def _is_admitted(self, door: MetricsDoor) -> bool:
        presented = self.headers.get_all("authorization")
        certificate = self.request.getpeercert() if isinstance(self.request, ssl.SSLSocket) else None
        host, port = self.client_address[:2]
        status, problem = door.why_not(", ".join(presented) if presented else None, certificate, f"{host}:{port}")
        if status == 200:
            return True
        body = f"{problem}\n".encode()
        self.send_response(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return False


class _Server(ThreadingHTTPServer):
    context: ssl.SSLContext | None = None

    def __init__(self, *arguments: Any) -> None:
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(*arguments)

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        if self.context is None:
            return connection, address
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that failed is not worth http.server's traceback."""
        log.info("/metrics: %s: %r", client_address[0], sys.exception())

    def server_bind(self) -> None:
        """Without http.server's reverse look-up of the host's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class MetricsEndpoint:
    """Serves until ``close``.

    Args:
        door: asked before every answer, and closed with the endpoint; None = anybody may read, in the clear.

    Raises:
        UserError: the address cannot be bound.
    """

    def __init__(self, metrics: Metrics, host: str, port: int, door: MetricsDoor | None = None) -> None:
        self._door = door
        registry = CollectorRegistry()
        registry.register(MetricsCollector(metrics))
        handler = type("Handler", (_Handler,), {"registry": registry, "door": door})
        context = door.context if door is not None else None
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            server_type = type("Server", (_Server,), {"address_family": family, "context": context})
            self._server = server_type(address, handler)
        except OSError as error:
            raise UserError(
                "telemetry.metrics_port",
                f"{host}:{port} cannot be bound ({error})",
                "choose a free port (0 = any), or leave it out to do without /metrics",
            ) from None
        host = f"[{host}]" if ":" in host else host
        self.address = f"{host}:{self._server.server_port}"
        self.url = f"{'http' if context is None else 'https'}://{self.address}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_SHUTDOWN_POLL_S,), name="metrics-endpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        stopping = threading.Thread(target=self._server.shutdown, name="metrics-endpoint-stop", daemon=True)
        stopping.start()
        with contextlib.suppress(OSError):  # wakes it, so that it looks now
            socket.create_connection(self._server.server_address[:2], timeout=_SHUTDOWN_POLL_S).close()
        stopping.join()
        self._server.server_close()
        self._thread.join()
        if self._door is not None:
            self._door.close()
