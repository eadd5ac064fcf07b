"""Spans and metrics of a request on an attention server."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import NonRecordingSpan, StatusCode

from expertmesh.attention_server.request import parse_submit
from expertmesh.attention_server.tracing import trace_request
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.telemetry import Metrics, Telemetry, traceparent_of
from expertmesh.v1 import attention_pb2, generate_pb2
from support.attention import LocalEngine, PlainExperts, one_torch_thread
from support.checkpoints import write_checkpoint

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


def submit_message(handle: int, *, sampled: bool) -> attention_pb2.Submit:
    return attention_pb2.Submit(
        handle=handle,
        request_id=f"r{handle}",
        prompt_token_ids=[1, 2, 3],
        sampling_params=generate_pb2.SamplingParams(max_tokens=4, temperature=0.5),
        traceparent=f"00-{TRACE_ID}-b7ad6b7169203331-0{int(sampled)}",
    )


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(spans: InMemorySpanExporter) -> Telemetry:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Telemetry(provider.get_tracer("test"), Metrics(role="attention"), tracing=True)


def test_request_leaves_a_span_and_steps_are_sampled(
    tmp_path: Path, telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    spec, checkpoint = load_spec(ModelConfig(path=path)), Checkpoint(path)
    with one_torch_thread():
        engine = LocalEngine(spec, checkpoint, PlainExperts(spec, checkpoint), telemetry=telemetry)
        message = submit_message(1, sampled=True)
        sequence = parse_submit(message, link=1, now_s=99.0, vocab_size=512, max_model_len=256)
        sequence.trace = trace_request(telemetry, message, model="tiny")
        engine.half.engine.post(sequence)
        traced = []
        for _ in range(4):
            engine.half.prepare()
            traced.append(engine.half.traceparent())
            engine.forward()
            engine.half.finish()
            engine.now[0] += 0.6
    queue, chunk, decode, span = spans.get_finished_spans()
    assert [queue.name, chunk.name, decode.name] == ["queue", "prefill chunk", "decode"]
    assert all(child.parent is not None and child.parent == span.context for child in (queue, chunk, decode))
    assert queue.end_time <= chunk.end_time <= decode.start_time <= decode.end_time  # type: ignore[operator]  # they ended
    assert chunk.attributes == {"expertmesh.chunk.start": 0, "expertmesh.chunk.tokens": 3}
    assert span.name == "attention.request"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert [event.name for event in span.events] == ["first token"]
    assert span.attributes is not None
    assert span.attributes["gen_ai.usage.input_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    own = f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert traced == [own, "", own, ""]
    metrics = telemetry.metrics
    assert metrics.prompt_tokens.labels().read() == 3
    assert metrics.generation_tokens.labels().read() == 4
    assert metrics.request_queue_time_seconds.labels().read().sum == pytest.approx(1.0)
    assert metrics.num_requests_running.labels().read() == 0


def test_what_touches_a_request_is_linked_from_it(telemetry: Telemetry, spans: InMemorySpanExporter) -> None:
    trace = trace_request(telemetry, submit_message(1, sampled=True), model="tiny")
    assert trace is not None
    other = telemetry.tracer.start_span("view_change")
    trace.link(traceparent_of(other), "view_change")
    trace.link("", "migration")
    trace.end(input_tokens=1, output_tokens=0, cached_tokens=0, error="")
    (link,) = spans.get_finished_spans()[-1].links
    assert traceparent_of(NonRecordingSpan(link.context)) == traceparent_of(other)
    assert dict(link.attributes or {}) == {"expertmesh.link": "view_change"}


def test_what_was_drafted_and_accepted_is_told(telemetry: Telemetry, spans: InMemorySpanExporter) -> None:
    trace = trace_request(telemetry, submit_message(1, sampled=True), model="tiny")
    assert trace is not None
    trace.first_token()
    trace.speculated(4, 3)
    trace.speculated(4, 0)
    trace.end(input_tokens=3, output_tokens=6, cached_tokens=0, error="")
    decode, _ = spans.get_finished_spans()
    found = {key.removeprefix("expertmesh.speculation."): value for key, value in (decode.attributes or {}).items()}
    assert (found["drafted_tokens"], found["accepted_tokens"]) == (8, 3)


def test_what_precedes_the_queue_ends_where_it_begins(telemetry: Telemetry, spans: InMemorySpanExporter) -> None:
    trace = trace_request(telemetry, submit_message(1, sampled=True), model="tiny")
    assert trace is not None
    trace.prepared("constraint", {"expertmesh.constraint": "regex"})
    trace.prepared("kv handover", {"expertmesh.kv.blocks": 7})
    trace.started()
    trace.refused("aborted")
    constraint, handover, queue, span = spans.get_finished_spans()
    assert [constraint.name, handover.name, queue.name] == ["constraint", "kv handover", "queue"]
    assert (constraint.end_time, handover.end_time) == (handover.start_time, queue.start_time)
    assert span.status.status_code is StatusCode.ERROR


def test_unsampled_request_costs_no_span(telemetry: Telemetry) -> None:
    assert trace_request(telemetry, submit_message(1, sampled=False), model="tiny") is None
    assert trace_request(telemetry, attention_pb2.Submit(), model="tiny") is None
