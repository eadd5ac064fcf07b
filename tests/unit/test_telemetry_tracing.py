"""W3C helpers, identity on spans, sampling, spans from stamps."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Tracer

from expertmesh.mesh.telemetry import (
    context_from_traceparent,
    disabled_telemetry,
    extract_context,
    inject_metadata,
    is_sampled,
    link_to,
    record_span,
    traceparent_of,
)
from expertmesh.mesh.telemetry.otlp import Delivery, SampleRatios, make_provider, make_resource

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-01"
UNSAMPLED = f"00-{TRACE_ID}-b7ad6b7169203331-00"


def make_tracer(requests: float = 1.0, control: float = 1.0) -> tuple[Tracer, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    resource = make_resource("router", "router-0")
    ratios = SampleRatios(requests=requests, control=control)
    provider = make_provider(resource, "router", "router-0", ratios, SimpleSpanProcessor(exporter))
    return provider.get_tracer("test"), exporter


def test_metadata_carries_a_trace_from_client_to_server() -> None:
    tracer, exporter = make_tracer()
    with tracer.start_as_current_span("client") as client:
        metadata = inject_metadata((("tenant", "a"), ("blob-bin", b"\x00")))
    assert metadata[:2] == (("tenant", "a"), ("blob-bin", b"\x00"))
    assert ("traceparent", traceparent_of(client)) in metadata
    tracer.start_span("server", context=extract_context(metadata)).end()
    server = exporter.get_finished_spans()[-1]
    assert server.parent is not None
    assert server.parent.span_id == client.get_span_context().span_id
    assert server.parent.is_remote


def test_no_metadata_is_a_new_trace_even_inside_a_span() -> None:
    tracer, exporter = make_tracer()
    with tracer.start_as_current_span("outer"):
        for metadata in (None, (), (("traceparent", "nonsense"),), (("traceparent", b"\xff"),)):
            tracer.start_span("server", context=extract_context(metadata)).end()
    assert [span.parent for span in exporter.get_finished_spans()] == [None] * 5


def test_traceparent_round_trip() -> None:
    context = context_from_traceparent(SAMPLED)
    assert traceparent_of(trace.get_current_span(context)) == SAMPLED
    assert traceparent_of(trace.INVALID_SPAN) == ""
    assert inject_metadata(context=context) == (("traceparent", SAMPLED),)
    assert inject_metadata(context=context_from_traceparent("")) == ()


def test_is_sampled() -> None:
    assert is_sampled(SAMPLED)
    assert not is_sampled(UNSAMPLED)
    assert not is_sampled("")
    assert not is_sampled("x" * 55)


@given(st.text(max_size=80))
def test_any_text_for_a_traceparent_is_harmless(text: str) -> None:
    assert isinstance(is_sampled(text), bool)
    extract_context((("traceparent", text), ("tracestate", text)))


def test_the_callers_decision_goes_before_the_ratio() -> None:
    tracer, exporter = make_tracer(requests=0.0)
    tracer.start_span("own").end()
    tracer.start_span("unsampled", context=context_from_traceparent(UNSAMPLED)).end()
    tracer.start_span("sampled", context=context_from_traceparent(SAMPLED)).end()
    assert [span.name for span in exporter.get_finished_spans()] == ["sampled"]


def test_requests_and_control_traces_are_sampled_apart() -> None:
    for requests, control, kept in ((0.0, 1.0, ["migration", "failure"]), (1.0, 0.0, ["generate m"])):
        tracer, exporter = make_tracer(requests, control)
        for name in ("generate m", "migration", "failure"):
            tracer.start_span(name).end()
        assert [span.name for span in exporter.get_finished_spans()] == kept


def test_links_lead_to_sampled_spans_only() -> None:
    tracer, exporter = make_tracer()
    span = tracer.start_span("request")
    for traceparent in (SAMPLED, UNSAMPLED, "", "nonsense"):
        link_to(span, traceparent, "step")
    span.end()
    (link,) = exporter.get_finished_spans()[0].links
    assert f"{link.context.trace_id:032x}" == TRACE_ID
    assert dict(link.attributes or {}) == {"expertmesh.link": "step"}


def test_spans_name_role_and_instance_beside_the_resource() -> None:
    tracer, exporter = make_tracer()
    tracer.start_span("x", attributes={"a": 1}).end()
    span = exporter.get_finished_spans()[0]
    assert dict(span.attributes or {}) == {"a": 1, "expertmesh.role": "router", "expertmesh.instance": "router-0"}
    assert span.resource.attributes["service.name"] == "expertmesh-router"
    assert span.resource.attributes["service.instance.id"] == "router-0"


def test_spans_from_stamps_nest() -> None:
    tracer, exporter = make_tracer()
    step = record_span(tracer, "step", context_from_traceparent(SAMPLED), 1000, 9000, {"tokens": 3}, SpanKind.SERVER)
    record_span(tracer, "layer", trace.set_span_in_context(step), 2000, 3000)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert (spans["step"].start_time, spans["step"].end_time, spans["step"].kind) == (1000, 9000, SpanKind.SERVER)
    assert (spans["step"].attributes or {})["tokens"] == 3
    assert (spans["layer"].start_time, spans["layer"].end_time) == (2000, 3000)
    parent = spans["layer"].parent
    assert parent is not None
    assert parent.span_id == step.get_span_context().span_id
    assert f"{step.get_span_context().trace_id:032x}" == TRACE_ID


def test_a_disabled_tracer_passes_the_callers_context_on() -> None:
    telemetry = disabled_telemetry()
    assert not telemetry.tracing
    span = telemetry.tracer.start_span("x", context=context_from_traceparent(SAMPLED))
    assert not span.is_recording()
    assert traceparent_of(span) == SAMPLED
    assert traceparent_of(telemetry.tracer.start_span("x")) == ""


def test_a_lost_collector_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    delivery = Delivery("spans", "http://collector:4317")
    for delivered in (True, False, False, False, True, True):
        delivery.note(delivered)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "http://collector:4317" in caplog.text
