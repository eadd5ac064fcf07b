"""What tracing costs piece by piece, in CPU time: a request that is not sampled, and a span that is recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import grpc  # noqa: F401  # before torch
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import NoOpTracer

from expertmesh.attention_server.tracing import trace_request
from expertmesh.mesh.telemetry import Metrics, Telemetry, record_span
from expertmesh.mesh.telemetry.otlp import SampleRatios, make_provider, make_resource
from expertmesh.router.detokenizer import Detokenizer
from expertmesh.router.generation import Generation
from expertmesh.router.slo import Objectives
from expertmesh.router.spans import RequestObserver, RequestTelemetry, TokenGaps
from expertmesh.v1 import attention_pb2, generate_pb2

NUMBER, REPEATS = 2000, 5
LAYER_ATTRIBUTES = {
    "expertmesh.layer": 3,
    "expertmesh.expert_rank.tokens": 64,
    "expertmesh.expert.ids": list(range(16)),
    "expertmesh.expert.rows": list(range(16)),
}
"""Of the widest span of a step."""


class _Dropped(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def cpu_us(work: Callable[[], object]) -> float:
    """Of one call on this thread: the fastest of several runs, which is what nothing else disturbed."""
    best_s = float("inf")
    for _ in range(REPEATS):
        started_s = time.thread_time()
        for _ in range(NUMBER):
            work()
        best_s = min(best_s, time.thread_time() - started_s)
    return best_s / NUMBER * 1e6


def measure(num_tokens: int) -> dict[str, float]:
    """A request of ``num_tokens`` tokens that is not sampled, on its router and its attention server, against one
    without tracing; and one recorded span, without what exporting it takes."""
    provider = make_provider(
        make_resource("router", "router-0"),
        "router",
        "router-0",
        SampleRatios(requests=0.0, control=1.0),
        BatchSpanProcessor(_Dropped()),
    )
    tracer, without = provider.get_tracer("expertmesh"), NoOpTracer()
    try:
        request = _routed(Telemetry(tracer, Metrics(enabled=False), tracing=True), num_tokens)
        plain = _routed(Telemetry(without, Metrics(enabled=False)), num_tokens)
        submit = attention_pb2.Submit(traceparent=f"00-{'ab' * 16}-{'cd' * 8}-00")
        on = Telemetry(tracer, Metrics(enabled=False), tracing=True)
        with tracer.start_as_current_span("failure"):  # a root that is sampled
            span_us = cpu_us(lambda: record_span(tracer, "expert_compute", None, 1, 2, LAYER_ATTRIBUTES))
        return {
            "request_on_router_us": round(cpu_us(request) - cpu_us(plain), 2),
            "request_on_attention_server_us": round(cpu_us(lambda: trace_request(on, submit, model="demo")), 2),
            "span_us": round(span_us, 2),
        }
    finally:
        provider.shutdown()


def _routed(telemetry: Telemetry, num_tokens: int) -> Callable[[], None]:
    """All that a router tells its telemetry of a request, but for its tokens after the first."""
    objectives = Objectives(telemetry.metrics, ttft_s=2.0, tpot_s=0.2)
    gaps = TokenGaps(telemetry.metrics.inter_token_latency_seconds.labels())
    observer = RequestObserver(telemetry=telemetry, model="demo", objectives=objectives, gaps=gaps)
    generation = Generation(
        request_id="r",
        prompt_token_ids=[1] * 16,
        sampling=generate_pb2.SamplingParams(max_tokens=num_tokens),
        detokenizer=Detokenizer(lambda token: "", stop=(), include_stop=False, min_tokens=0),
        max_replays=1,
        clock=time.monotonic,
        accepted_s=0.0,
    )
    generation.first_token_s = generation.last_token_s = 1.0
    finish = generate_pb2.Finish(reason=generate_pb2.FINISH_REASON_LENGTH, completion_tokens=num_tokens)

    def run() -> None:
        told = RequestTelemetry(observer, operation="text_completion", metadata=())
        told.on_admitted("r")
        told.on_tokenised(16)
        told.on_accepted(generation)
        told.on_choosing()
        told.on_placed(generation, "attention-0", 1)
        _ = told.traceparent
        told.on_first_token(1.0)
        _ = told.on_gap  # takes the other tokens, and is not tracing's where the request is not sampled
        told.on_finish(generation, finish)
        told.end()

    return run
