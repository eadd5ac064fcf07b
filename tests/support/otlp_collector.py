"""An OTLP/gRPC collector that keeps what it gets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """``spans`` and ``metrics`` as they came, each with the attributes of its resource."""

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[tuple[dict[str, Any], Span]] = []
        self.metrics: list[tuple[dict[str, Any], Metric]] = []
        self._changed = threading.Condition()

    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        with self._changed:
            for part in request.resource_spans:
                for scope in part.scope_spans:
                    self.spans.extend((attributes(part.resource.attributes), span) for span in scope.spans)
            self._changed.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def take_metrics(self, request: metrics_service_pb2.ExportMetricsServiceRequest) -> None:
        with self._changed:
            for part in request.resource_metrics:
                for scope in part.scope_metrics:
                    self.metrics.extend((attributes(part.resource.attributes), metric) for metric in scope.metrics)
            self._changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(predicate, timeout_s), f"nothing of the kind within {timeout_s} s"


class _MetricsService(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        self._collector.take_metrics(request)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def attributes(pairs: Any) -> dict[str, Any]:
    """OTLP key-values as a dict."""

    def value(pair: KeyValue) -> Any:
        return getattr(pair.value, pair.value.WhichOneof("value") or "string_value")

    return {pair.key: value(pair) for pair in pairs}


@contextmanager
def running_collector() -> Iterator[Collector]:
    """A collector on a free port of the loopback interface."""
    collector = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]  # generated without annotations
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_MetricsService(collector), server)  # type: ignore[no-untyped-call]  # generated without annotations
        collector.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield collector
        finally:
            server.stop(None).wait(10)
