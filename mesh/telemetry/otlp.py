"""Traces and metrics to an OTLP/gRPC collector, by the OpenTelemetry SDK. Imported only when OTLP export is on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, SamplingResult, TraceIdRatioBased
from opentelemetry.trace import Link, SpanKind, Tracer, TraceState
from opentelemetry.util.types import Attributes

import expertmesh
from expertmesh.mesh.telemetry.metrics import Metrics
from expertmesh.mesh.telemetry.otlp_metrics import MetricsReader
from expertmesh.mesh.telemetry.tracing import CONTROL_SPANS

log = logging.getLogger(__name__)

# Once told to stop, an exporter returns as soon as its call is cancelled.
_ABORT_TIMEOUT_S = 1.0


class Delivery:
    """Says once that a collector is lost, and once that it is back, whatever the number of failed exports between."""

    def __init__(self, what: str, endpoint: str) -> None:
        self._what = what
        self._endpoint = endpoint
        self._lost = False

    def note(self, delivered: bool) -> None:
        """After each export, in the thread that made it."""
        if delivered and self._lost:
            log.info("%s reach %s again", self._what, self._endpoint)
        elif not delivered and not self._lost:
            log.warning("%s do not reach %s and are dropped until they do (%s)", self._what, self._endpoint, _reason())
        self._lost = not delivered


class _LastWords(logging.Filter):
    """Keeps the exporters' own records, several for each failed export, off the log; remembers each thread's last."""

    def __init__(self) -> None:
        super().__init__()
        self.local = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        self.local.message = record.getMessage()
        return False


class _Once(logging.Filter):
    """Passes each message once: the SDK says "queue full" every 20 s for as long as a collector is gone."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = str(record.msg) not in self._said
        self._said.add(str(record.msg))
        return new


_LAST_WORDS = _LastWords()
logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter").addFilter(_LAST_WORDS)
logging.getLogger("opentelemetry.sdk._shared_internal").addFilter(_Once())


def _reason() -> str:
    return str(getattr(_LAST_WORDS.local, "message", "no reason given"))


class IdentityProcessor(SpanProcessor):
    """Role and instance on each span: some trace UIs drop resource attributes."""

    def __init__(self, role: str, instance: str) -> None:
        self._attributes = {"expertmesh.role": role, "expertmesh.instance": instance}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        span.set_attributes(self._attributes)


@dataclass(frozen=True, kw_only=True)
class SampleRatios:
    """Of the traces that begin here: ``requests``, and ``control``: migrations, view changes and failures."""

    requests: float
    control: float


class _RootSampler(Sampler):
    def __init__(self, ratios: SampleRatios) -> None:
        self._requests = TraceIdRatioBased(ratios.requests)
        self._control = TraceIdRatioBased(ratios.control)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        sampler = self._control if name in CONTROL_SPANS else self._requests
        return sampler.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return f"requests {self._requests.get_description()}, control {self._control.get_description()}"


class _ReportingSpanExporter(SpanExporter):
    def __init__(self, exporter: SpanExporter, delivery: Delivery) -> None:
        self._exporter = exporter
        self._delivery = delivery

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self._delivery.note(result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class Tracing:
    """A tracer provider that can be stopped in bounded time."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        self._provider = provider
        self._exporter = exporter

    def shutdown(self, timeout_s: float) -> None:
        """Flush for at most ``timeout_s`` (the SDK would try for 30 s), then drop what is left."""
        thread = threading.Thread(target=self._provider.shutdown, name="otlp-spans-shutdown", daemon=True)
        thread.start()
        _join_or_abort(thread, timeout_s, self._exporter.shutdown)


class MetricsExporting:
    """Exports all metrics every ``interval_s`` seconds, and once more when it is shut down."""

    def __init__(self, reader: MetricsReader, exporter: MetricExporter, delivery: Delivery, interval_s: float) -> None:
        self._reader = reader
        self._exporter = exporter
        self._delivery = delivery
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._export()
        self._export()

    def _export(self) -> None:
        result = self._exporter.export(self._reader.read())
        self._delivery.note(result is MetricExportResult.SUCCESS)

    def shutdown(self, timeout_s: float) -> None:
        """Export a last time, for at most ``timeout_s``."""
        self._stopping.set()
        _join_or_abort(self._thread, timeout_s, self._exporter.shutdown)


def _join_or_abort(thread: threading.Thread, timeout_s: float, shut_exporter: Callable[[], None]) -> None:
    thread.join(timeout_s)
    # Cancels a running export; its thread then ends by itself.
    shut_exporter()
    thread.join(_ABORT_TIMEOUT_S)


def start_otlp(
    endpoint: str, role: str, instance: str, ratios: SampleRatios, metrics: Metrics, metrics_interval_s: float
) -> tuple[Tracer, tuple[Tracing, MetricsExporting]]:
    """Spans in batches, and all metrics every ``metrics_interval_s`` seconds, to the URL ``endpoint``."""
    resource = make_resource(role, instance)
    spans = _ReportingSpanExporter(OTLPSpanExporter(endpoint), Delivery("spans", endpoint))
    provider = make_provider(resource, role, instance, ratios, BatchSpanProcessor(spans))
    exporting = MetricsExporting(
        MetricsReader(metrics, resource),
        OTLPMetricExporter(endpoint),
        Delivery("metrics", endpoint),
        metrics_interval_s,
    )
    return provider.get_tracer("expertmesh", expertmesh.__version__), (Tracing(provider, spans), exporting)


def make_provider(
    resource: Resource, role: str, instance: str, ratios: SampleRatios, processor: SpanProcessor
) -> TracerProvider:
    """A request's own trace context decides whether it is sampled; without one ``ratios`` do."""
    provider = TracerProvider(
        sampler=ParentBased(_RootSampler(ratios)),
        resource=resource,
        shutdown_on_exit=False,  # it would wait 30 s for a collector that is gone
    )
    provider.add_span_processor(IdentityProcessor(role, instance))
    provider.add_span_processor(processor)
    return provider


def make_resource(role: str, instance: str) -> Resource:
    """Who sends: the attributes of OpenTelemetry's resource conventions, and those of ``OTEL_RESOURCE_ATTRIBUTES``."""
    return Resource.create(
        {
            "service.name": f"expertmesh-{role}",
            "service.namespace": "expertmesh",
            "service.instance.id": instance,
            "service.version": expertmesh.__version__,
        }
    )
