"""The cells of ``Metrics`` as OpenTelemetry metrics data. Imported only when OTLP export is on."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

import expertmesh
from expertmesh.mesh.telemetry import instruments
from expertmesh.mesh.telemetry.metrics import Metrics
from expertmesh.mesh.telemetry.tables.declared import Declared

# Prometheus label → OpenTelemetry attribute, where the GenAI semantic conventions have one.
_ATTRIBUTES = {
    "model_name": "gen_ai.request.model",
    "role": "expertmesh.role",
    "server_id": "expertmesh.instance",
}
_GEN_AI = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "expertmesh"}


class MetricsReader:
    """Cumulative since construction."""

    def __init__(self, metrics: Metrics, resource: Resource) -> None:
        self._metrics = metrics
        self._resource = resource
        self._scope = InstrumentationScope("expertmesh", expertmesh.__version__)
        self._start_ns = time.time_ns()

    def read(self) -> MetricsData:
        """Every series that has been recorded, as of now."""
        now_ns = time.time_ns()
        metrics = [
            Metric(
                name=declared.otel,
                description=declared.help,
                unit=declared.unit,
                data=self._data(declared, family, shared, now_ns),
            )
            for declared, family, shared in self._metrics.families()
            if family.series()
        ]
        scope = ScopeMetrics(scope=self._scope, metrics=metrics, schema_url="")
        return MetricsData([ResourceMetrics(resource=self._resource, scope_metrics=[scope], schema_url="")])

    def _data(
        self, declared: Declared[Any], family: instruments.Family[Any], shared: dict[str, str], now_ns: int
    ) -> Sum | Gauge | Histogram:
        fixed = shared | (_GEN_AI if declared.otel.startswith("gen_ai.") else {})
        series = [(_attributes(fixed | labels), cell.read()) for labels, cell in family.series()]
        if declared.kind is instruments.Histogram:
            return Histogram(self._distributions(series, now_ns), AggregationTemporality.CUMULATIVE)
        is_counter = declared.kind is instruments.Counter
        points = [
            NumberDataPoint(
                attributes=attributes,
                start_time_unix_nano=self._start_ns if is_counter else 0,
                time_unix_nano=now_ns,
                value=float(value),
            )
            for attributes, value in series
        ]
        if is_counter:
            return Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
        return Gauge(points)

    def _distributions(
        self, series: Iterable[tuple[dict[str, str], instruments.Distribution]], now_ns: int
    ) -> list[HistogramDataPoint]:
        return [
            HistogramDataPoint(
                attributes=attributes,
                start_time_unix_nano=self._start_ns,
                time_unix_nano=now_ns,
                count=sum(seen.counts),
                sum=seen.sum,
                bucket_counts=seen.counts,
                explicit_bounds=seen.bounds,
                exemplars=[_exemplar(exemplar) for exemplar in seen.exemplars if exemplar is not None],
                # Optional in OTLP; over the life of a process they say little and would cost time at each record.
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
            )
            for attributes, seen in series
        ]


def _attributes(labels: dict[str, str]) -> dict[str, str]:
    return {
        _ATTRIBUTES.get(name, name if "." in name else f"expertmesh.{name}"): value for name, value in labels.items()
    }


def _exemplar(seen: instruments.Exemplar) -> Exemplar:
    return Exemplar(
        filtered_attributes={},
        value=seen.value,
        time_unix_nano=int(seen.unix_s * 1e9),
        span_id=int(seen.span_id, 16),
        trace_id=int(seen.trace_id, 16),
    )
