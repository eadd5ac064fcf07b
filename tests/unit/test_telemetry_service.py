"""``setup_telemetry``: what is started for which configuration, and what it costs when off."""

from __future__ import annotations

import subprocess
import sys

import pytest

from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.telemetry import setup_telemetry


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_METRIC_EXPORT_INTERVAL"):
        monkeypatch.delenv(name, raising=False)


def test_off_by_default() -> None:
    telemetry = setup_telemetry(TelemetryConfig(), role="router", instance="router-0")
    assert not telemetry.tracing
    assert not telemetry.metrics.enabled
    assert telemetry.metrics_address is None
    telemetry.shutdown()


def test_the_metrics_port_alone_starts_no_tracing() -> None:
    telemetry = setup_telemetry(TelemetryConfig(metrics_port=0), role="router", instance="router-0")
    try:
        assert telemetry.metrics.enabled
        assert not telemetry.tracing
        assert telemetry.metrics_address is not None
        assert telemetry.metrics_address.startswith("127.0.0.1:")
    finally:
        telemetry.shutdown()
    assert telemetry.metrics_address is None
    telemetry.shutdown()


@pytest.mark.parametrize("endpoint", ["ftp://collector:21", "http://", "://x"])
def test_an_endpoint_that_cannot_be_otlp_names_the_key(endpoint: str) -> None:
    with pytest.raises(UserError, match=r"telemetry\.otlp_endpoint"):
        setup_telemetry(TelemetryConfig(otlp_endpoint=endpoint), role="router", instance="router-0")


@pytest.mark.parametrize("interval", ["soon", "0", "-1"])
def test_an_interval_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, interval: str) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", interval)
    with pytest.raises(UserError, match="OTEL_METRIC_EXPORT_INTERVAL"):
        setup_telemetry(TelemetryConfig(otlp_endpoint="http://c:1"), role="router", instance="router-0")


def test_opentelemetrys_own_switch_turns_export_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert not setup_telemetry(TelemetryConfig(), role="router", instance="router-0").tracing


@pytest.mark.slow
def test_disabled_telemetry_imports_neither_sdk_nor_exporters() -> None:
    program = """
import sys
from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.telemetry import setup_telemetry
telemetry = setup_telemetry(TelemetryConfig(), role="expert", instance="expert-0")
with telemetry.tracer.start_as_current_span("x"):
    telemetry.metrics.step_tokens.observe(1)
telemetry.shutdown()
heavy = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto", "prometheus_client", "grpc", "http")
print(sorted(name for name in sys.modules if name.startswith(heavy)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={"PATH": ""}, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
