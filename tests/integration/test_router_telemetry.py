"""One span a request, a child of the client's, with GenAI attributes; metrics that tell how requests ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.telemetry import Metrics, Telemetry
from expertmesh.router import wire
from expertmesh.router.calls import Call
from expertmesh.v1 import generate_pb2_grpc
from support.fake_attention import FakeAttention
from support.router_stand import Stand

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Observed(Stand):
    def __init__(self) -> None:
        self.spans = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.spans))
        self.metrics = Metrics(role="router")
        super().__init__(Telemetry(provider.get_tracer("test"), self.metrics, tracing=True))


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[Observed]:
    running = Observed()
    yield running
    await running.close()


async def test_span_and_metrics_of_a_request(stand: Observed) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    async with rpc.open_channel(stand.address, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        request = build_request([5, 6, 7], max_tokens=4, seed=9, temperature=0.5, request_id="r1")
        async for _ in stub.Generate(request, metadata=(("traceparent", TRACEPARENT),)):
            pass
    await stand.close()
    *phases, span = stand.spans.get_finished_spans()
    assert [phase.name for phase in phases] == ["admission", "tokenise", "queue", "choose attention server"]
    assert all(phase.parent == span.context for phase in phases)
    stamps = [span.start_time, *(stamp for phase in phases for stamp in (phase.start_time, phase.end_time))]
    assert stamps == sorted(stamps, key=lambda stamp: stamp or 0), "one after the other"
    assert (phases[-1].attributes or {})["expertmesh.server_id"] == "a0"
    assert (span.name, span.kind) == ("generate expertmesh-demo", SpanKind.SERVER)
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert server.submits[0].traceparent == f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    attributes = dict(span.attributes or {})
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "expertmesh-demo",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.seed": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": "r1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
    }
    assert {name: attributes.get(name) for name in expected} == expected
    assert sum(stand.metrics.time_to_first_token_seconds.labels().read().counts) == 1
    assert sum(stand.metrics.inter_token_latency_seconds.labels().read().counts) == 3
    assert stand.metrics.request_success.labels(finished_reason="length").read() == 1
    assert stand.metrics.slo_requests.labels(objective="all", met="true").read() == 1
    assert stand.metrics.goodput_tokens.labels().read() == 4
    (exemplar,) = [e for e in stand.metrics.time_to_first_token_seconds.labels().read().exemplars if e is not None]
    assert (exemplar.trace_id, exemplar.span_id) == (TRACE_ID, f"{span.context.span_id:016x}")
    assert stand.metrics.router_requests_inflight.labels().read() == 0


async def test_refused_and_cancelled_requests_are_told_apart(stand: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    def call_of(context: Any) -> Call:
        """The client and gRPC would notice in the same moment as the router that the time is up."""
        call = wire.call_of(context)
        return call if call.deadline_s is None else replace(call, deadline_s=call.deadline_s - 9.5)

    monkeypatch.setattr("expertmesh.router.service.call_of", call_of)
    server = FakeAttention("a0")
    client = await stand.start([server])
    with pytest.raises(grpc.aio.AioRpcError):
        await client.complete(build_request([5], top_p=3))
    server.going.clear()
    stream = client.stream(build_request([5], max_tokens=5))
    with pytest.raises(grpc.aio.AioRpcError):
        await client.complete(build_request([5]), timeout_s=10.0)
    await stream.aclose()  # type: ignore[attr-defined]  # an asynchronous generator, declared by what callers need of it
    await stand.close()
    refused, late = [span for span in stand.spans.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert refused.status.status_code is late.status.status_code is StatusCode.ERROR
    assert (refused.attributes or {})["error.type"] == "INVALID_ARGUMENT"
    assert (late.attributes or {})["error.type"] == "DEADLINE_EXCEEDED"
    assert stand.metrics.requests_rejected.labels(reason="invalid_argument").read() == 1
    judged = {met: stand.metrics.slo_requests.labels(objective="served", met=met).read() for met in ("true", "false")}
    assert judged == {"true": 0, "false": 1}, "late is ours, a bad request and a client that went away are not"
    assert stand.metrics.router_requests_inflight.labels().read() == 0


async def test_a_client_that_keeps_its_deadline_itself_was_not_served(
    stand: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.router.calls.DEADLINE_SLACK_S", 60.0)
    server = FakeAttention("a0")
    await stand.start([server])
    async with rpc.open_channel(stand.address, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(build_request([5], max_tokens=20), timeout=30.0)
        await call.read()
        call.cancel()
    await stand.close()
    span = stand.spans.get_finished_spans()[-1]
    assert (span.attributes or {})["error.type"] == "DEADLINE_EXCEEDED"
    assert stand.metrics.slo_requests.labels(objective="served", met="false").read() == 1


async def test_a_replay_has_a_span_and_a_link_to_the_view_change(stand: Observed) -> None:
    view_change = f"00-{'ab' * 16}-{'cd' * 8}-01"
    first, second = FakeAttention("a0"), FakeAttention("a1")
    await stand.start([first])
    async with rpc.open_channel(stand.address, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(build_request([5], max_tokens=20), metadata=(("traceparent", TRACEPARENT),))
        await call.read()
        stand.servers.append(await second.start())
        stand.balancer.publish([second], view_change)
        await first.stop()
        while await call.read() is not grpc.aio.EOF:
            pass
    await stand.close()
    *phases, span = stand.spans.get_finished_spans()
    assert [phase.name for phase in phases][-2:] == ["replay", "choose attention server"]
    replay = phases[-2].attributes or {}
    assert (replay["expertmesh.server_id"], replay["expertmesh.replays"]) == ("a1", 1)
    (link,) = span.links
    assert (f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") == ("ab" * 16, "cd" * 8)
