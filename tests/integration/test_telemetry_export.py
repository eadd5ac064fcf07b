"""Spans and metrics over real OTLP/gRPC, and a collector that is not there."""

from __future__ import annotations

import logging
import socket
import time

import pytest
from opentelemetry import trace

from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.telemetry import record_span, setup_telemetry
from support.otlp_collector import attributes, running_collector

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("source", ["configuration", "environment"])
def test_spans_and_metrics_reach_a_collector(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    with running_collector() as collector:
        if source == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.address}")
            config = TelemetryConfig()
        else:
            monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
            config = TelemetryConfig(otlp_endpoint=collector.address)
        telemetry = setup_telemetry(config, role="attention", instance="attention-1", model_name="demo")
        with telemetry.tracer.start_as_current_span("generate") as span:
            record_span(telemetry.tracer, "step", trace.set_span_in_context(span), 1000, 2000, {"layer": 3})
        telemetry.metrics.generation_tokens.add(5)
        telemetry.shutdown()
        assert {span.name for _, span in collector.spans} == {"generate", "step"}
        for resource, received in collector.spans:
            assert resource["service.name"] == "expertmesh-attention"
            assert resource["service.instance.id"] == "attention-1"
            assert attributes(received.attributes)["expertmesh.role"] == "attention"
        step = next(received for _, received in collector.spans if received.name == "step")
        assert (step.start_time_unix_nano, step.end_time_unix_nano) == (1000, 2000)
        tokens = [metric for _, metric in collector.metrics if metric.name == "expertmesh.generation_tokens"]
        assert tokens[-1].sum.data_points[0].as_double == 5


def test_metrics_come_periodically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    with running_collector() as collector:
        config = TelemetryConfig(otlp_endpoint=f"http://{collector.address}")
        telemetry = setup_telemetry(config, role="balancer", instance="balancer-0")
        telemetry.metrics.view_number.set(2)

        def views() -> list[float]:
            found = [metric for _, metric in collector.metrics if metric.name == "expertmesh.view_number"]
            return [metric.gauge.data_points[0].as_double for metric in found]

        collector.wait_for(lambda: views()[-2:] == [2, 2])
        telemetry.shutdown()


def test_without_a_collector_shutdown_is_bounded_and_the_log_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    caplog.set_level(logging.INFO)
    # Bound and not listening: a port that stays closed while the test runs.
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        config = TelemetryConfig(otlp_endpoint=f"http://127.0.0.1:{closed.getsockname()[1]}")
        telemetry = setup_telemetry(config, role="router", instance="router-0")
        for _ in range(5000):
            telemetry.tracer.start_span("x").end()
        started = time.monotonic()
        telemetry.shutdown(1.0)
        assert time.monotonic() - started < 8.0
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "do not reach" in text]) <= 2, warnings
    assert len(warnings) <= 3, warnings
