"""The configuration for the OpenTelemetry Collector, which no test runs: held against what its parts are known to take,
and against the spans that a mesh sends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from expertmesh.mesh.telemetry.otlp import SampleRatios, make_provider, make_resource

FILE = Path(__file__).parents[2] / "deploy/dashboards/otel-collector.yaml"
OTLP_GRPC_PORT = "4317"

# Kind → part → its options, as far as this configuration may want them.
PARTS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "receivers": {"otlp": frozenset({"protocols"})},
    "processors": {
        "memory_limiter": frozenset({"check_interval", "limit_percentage", "spike_limit_percentage"}),
        "batch": frozenset({"timeout", "send_batch_size", "send_batch_max_size"}),
        "tail_sampling": frozenset({"decision_wait", "num_traces", "expected_new_traces_per_sec", "policies"}),
    },
    "exporters": {
        "otlp": frozenset({"endpoint", "tls", "compression", "headers", "timeout", "sending_queue"}),
        "prometheus": frozenset(
            {"endpoint", "resource_to_telemetry_conversion", "enable_open_metrics", "metric_expiration", "namespace"}
        ),
    },
    "extensions": {"health_check": frozenset({"endpoint", "path"})},
}
POLICIES = {
    "status_code": {"status_codes"},
    "latency": {"threshold_ms", "upper_threshold_ms"},
    "string_attribute": {"key", "values"},
    "probabilistic": {"sampling_percentage"},
}


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return parsed


def test_pipelines_are_made_of_what_is_declared(config: dict[str, Any]) -> None:
    used: dict[str, set[str]] = {"extensions": set(config["service"]["extensions"])}
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            used.setdefault(kind, set()).update(names)
    assert used == {kind: set(config[kind]) for kind in PARTS}, "declared and not used, or the other way round"


def test_parts_and_their_options_exist(config: dict[str, Any]) -> None:
    assert set(config) == {*PARTS, "service"}
    for kind, known in PARTS.items():
        for name, options in config[kind].items():
            part = name.partition("/")[0]
            assert set(options) <= known[part], f"{kind}.{name}"


def test_it_listens_where_meshes_send(config: dict[str, Any]) -> None:
    assert config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rpartition(":")[2] == OTLP_GRPC_PORT


def test_policies_sample_by_what_spans_have(config: dict[str, Any]) -> None:
    spans = InMemorySpanExporter()
    ratios = SampleRatios(requests=1.0, control=1.0)
    resource = make_resource("balancer", "balancer-0")
    provider = make_provider(resource, "balancer", "balancer-0", ratios, SimpleSpanProcessor(spans))
    provider.get_tracer("test").start_span("migration").end()
    provider.shutdown()
    (span,) = spans.get_finished_spans()
    policies = config["processors"]["tail_sampling"]["policies"]
    assert len({policy["name"] for policy in policies}) == len(policies)
    for policy in policies:
        what, settings = policy["type"], policy[policy["type"]]
        assert set(policy) == {"name", "type", what}
        assert set(settings) <= POLICIES[what], policy["name"]
        if what == "string_attribute":
            assert (span.attributes or {})[settings["key"]] in settings["values"], "no span of a balancer has it"
        if what == "status_code":
            assert set(settings["status_codes"]) <= set(StatusCode.__members__)
