"""Traces, metrics and logs of every service.

Off by default and then free: the OpenTelemetry SDK, its exporter and prometheus_client are imported only when an
OTLP endpoint or /metrics is configured.
"""

from expertmesh.mesh.telemetry.instruments import Counter, Gauge, Histogram
from expertmesh.mesh.telemetry.logs import setup_logging
from expertmesh.mesh.telemetry.metrics import Metrics
from expertmesh.mesh.telemetry.service import Telemetry, disabled_telemetry, setup_telemetry
from expertmesh.mesh.telemetry.tracing import (
    context_from_traceparent,
    extract_context,
    inject_metadata,
    is_sampled,
    link_to,
    record_span,
    traceparent_of,
)

__all__ = [
    "Counter",
    "Gauge",
    "Histogram",
    "Metrics",
    "Telemetry",
    "context_from_traceparent",
    "disabled_telemetry",
    "extract_context",
    "inject_metadata",
    "is_sampled",
    "link_to",
    "record_span",
    "setup_logging",
    "setup_telemetry",
    "traceparent_of",
]
