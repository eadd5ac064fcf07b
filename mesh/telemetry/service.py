"""``Telemetry``: what a service holds of tracing and metrics."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from opentelemetry.trace import NoOpTracer, Tracer

import expertmesh
from expertmesh.mesh.config_security import ApiConfig, TlsConfig
from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from expertmesh.mesh.telemetry.prometheus import MetricsEndpoint

log = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S = 3.0
_DEFAULT_METRICS_INTERVAL_MS = "15000"
_NO_TLS, _NO_KEYS = TlsConfig(), ApiConfig()


class Exporting(Protocol):
    """Something that has to be flushed and stopped."""

    def shutdown(self, timeout_s: float) -> None: ...


class Telemetry:
    """``tracer`` and ``metrics`` do nothing, at the cost of a call, where telemetry is off."""

    def __init__(
        self,
        tracer: Tracer,
        metrics: Metrics,
        *,
        tracing: bool = False,
        endpoint: MetricsEndpoint | None = None,
        exporting: Sequence[Exporting] = (),
    ) -> None:
        self.tracer = tracer
        self.metrics = metrics
        self.tracing = tracing
        """Whether spans go anywhere: guard work that only serves spans with it."""
        self._endpoint = endpoint
        self._exporting = exporting

    @property
    def metrics_address(self) -> str | None:
        """``host:port`` of /metrics, or None when it is off."""
        return self._endpoint.address if self._endpoint is not None else None

    def shutdown(self, timeout_s: float = SHUTDOWN_TIMEOUT_S) -> None:
        """Flush, stop exporting, close /metrics. Blocks for about ``timeout_s`` at most, whatever the collector."""
        if self._endpoint is not None:
            self._endpoint.close()
        for exporting in self._exporting:
            exporting.shutdown(timeout_s / len(self._exporting))
        self._endpoint, self._exporting = None, ()


def disabled_telemetry() -> Telemetry:
    """Records nothing."""
    return Telemetry(NoOpTracer(), Metrics(enabled=False))


def setup_telemetry(
    config: TelemetryConfig,
    *,
    role: str,
    instance: str,
    model_name: str = "",
    tls: TlsConfig = _NO_TLS,
    api: ApiConfig = _NO_KEYS,
) -> Telemetry:
    """Start what the configuration asks for.

    Traces and metrics go to ``otlp_endpoint`` (else ``OTEL_EXPORTER_OTLP_ENDPOINT``), metrics also to /metrics. The
    other variables of OpenTelemetry's specification (headers, certificates, intervals, ``OTEL_SDK_DISABLED``) hold too.

    Args:
        role: router, attention, expert, both or balancer.
        instance: the server's id, unique in the mesh.
        model_name: label of the metrics under ``vllm:``.
        tls, api: what ``telemetry.metrics_access`` goes by.

    Raises:
        UserError: the metrics port cannot be bound, or not be guarded as ``metrics_access`` says, the endpoint is not
            one of OTLP/gRPC, or the interval is no time.
    """
    otlp_endpoint = _otlp_endpoint(config)
    interval_s = _metrics_interval_s()
    if otlp_endpoint is None and config.metrics_port is None:
        return disabled_telemetry()
    # Not `instance`: Prometheus gives that label to the scraped address and would rename ours.
    metrics = Metrics(role=role, constant_labels={"role": role, "server_id": instance}, model_name=model_name)
    metrics.build_info.set(1, version=expertmesh.__version__, python=platform.python_version())
    endpoint = None
    if config.metrics_port is not None:
        from expertmesh.mesh.telemetry.metrics_door import metrics_door
        from expertmesh.mesh.telemetry.prometheus import MetricsEndpoint

        door = None
        if config.metrics_access == "auto":
            api.check_door("telemetry.metrics_host", config.metrics_host, has_tls=tls.cert_file is not None)
            door = metrics_door(tls, api, instance)
        endpoint = MetricsEndpoint(metrics, config.metrics_host, config.metrics_port, door)
        log.info("metrics on %s", endpoint.url)
    if otlp_endpoint is None:
        return Telemetry(NoOpTracer(), metrics, endpoint=endpoint)
    from expertmesh.mesh.telemetry.otlp import SampleRatios, start_otlp

    ratios = SampleRatios(requests=config.trace_sample_ratio, control=config.control_sample_ratio)
    tracer, exporting = start_otlp(otlp_endpoint, role, instance, ratios, metrics, interval_s)
    return Telemetry(tracer, metrics, tracing=True, endpoint=endpoint, exporting=exporting)


def _otlp_endpoint(config: TelemetryConfig) -> str | None:
    """A URL with its scheme: the exporter takes ``host:port`` alone for a scheme and then insists on TLS."""
    endpoint = config.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    scheme, separator, rest = endpoint.rpartition("://")
    if not rest or (separator and scheme not in ("http", "https")):
        raise UserError(
            "telemetry.otlp_endpoint", f"{endpoint!r} is not an OTLP/gRPC endpoint", "write http://HOST:4317"
        )
    return endpoint if separator else f"http://{endpoint}"


def _metrics_interval_s() -> float:
    text = os.environ.get("OTEL_METRIC_EXPORT_INTERVAL", _DEFAULT_METRICS_INTERVAL_MS)
    try:
        interval_s = float(text) / 1000
    except ValueError:
        interval_s = 0
    if interval_s <= 0:
        raise UserError("OTEL_METRIC_EXPORT_INTERVAL", f"{text!r} is no time", "give a positive number of milliseconds")
    return interval_s
