"""Spans through a real OTLP collector: what it gives on is what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry import trace

from expertmesh.mesh.config_telemetry import TelemetryConfig
from expertmesh.mesh.telemetry import link_to, record_span, setup_telemetry, traceparent_of
from support.otlp_collector import attributes, running_collector
from support.tools import needs_tool
from support.trace_parts import running_rotel

pytestmark = [pytest.mark.slow, needs_tool("rotel")]


def test_parents_links_and_attributes_survive_a_collector(tmp_path: Path) -> None:
    with running_collector() as behind, running_rotel(tmp_path, behind.address) as address:
        telemetry = setup_telemetry(TelemetryConfig(otlp_endpoint=address), role="attention", instance="attention-1")
        migration = telemetry.tracer.start_span("migration", context=trace.set_span_in_context(trace.INVALID_SPAN))
        with telemetry.tracer.start_as_current_span("attention.request") as request:
            link_to(request, traceparent_of(migration), "migration")
            record_span(telemetry.tracer, "decode", None, 1000, 2000, {"expertmesh.expert.rows": [3, 1]})
        migration.end()
        telemetry.shutdown()
        behind.wait_for(lambda: len(behind.spans) == 3, timeout_s=30.0)
        spans = {span.name: span for _, span in behind.spans}
        assert spans["decode"].parent_span_id == spans["attention.request"].span_id
        (link,) = spans["attention.request"].links
        assert link.span_id == spans["migration"].span_id
        assert attributes(link.attributes) == {"expertmesh.link": "migration"}
        rows = attributes(spans["decode"].attributes)["expertmesh.expert.rows"]
        assert [value.int_value for value in rows.values] == [3, 1]
        assert {resource["service.instance.id"] for resource, _ in behind.spans} == {"attention-1"}
