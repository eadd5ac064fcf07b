"""Span and metrics of one request, with the attributes of OpenTelemetry's GenAI semantic conventions."""

from __future__ import annotations

import time

import grpc
from opentelemetry.trace import SpanKind, Status, StatusCode

from expertmesh.mesh.telemetry import Telemetry, extract_context, traceparent_of
from expertmesh.mesh.telemetry.tracing import Metadata
from expertmesh.router.generation import Generation
from expertmesh.v1 import generate_pb2

FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


class RequestTelemetry:
    """A server span from arrival to ``end``, a child of the client's span where it sent one.

    Args:
        model: as the mesh names it.
        metadata: of the call; may carry a W3C trace context.
    """

    def __init__(self, telemetry: Telemetry, *, model: str, operation: str, metadata: Metadata | None) -> None:
        self._metrics = telemetry.metrics
        self._started_s = time.monotonic()
        self._last_response_s = 0.0
        self._inflight = False
        self._placements = 0
        self._span = telemetry.tracer.start_span(
            f"generate {model}",
            context=extract_context(metadata),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "expertmesh",
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
            },
        )

    @property
    def traceparent(self) -> str:
        """W3C trace context for the attention server; '' when the request belongs to no trace."""
        return traceparent_of(self._span)

    def on_admitted(self, request_id: str) -> None:
        self._inflight = True
        self._metrics.router_requests_inflight.add(1)
        self._span.set_attribute("gen_ai.response.id", request_id)

    def on_accepted(self, generation: Generation) -> None:
        """The request is valid: what it asks for, resolved."""
        if not self._span.is_recording():
            return
        sampling = generation.sampling
        self._span.set_attributes(
            {
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
                "gen_ai.request.presence_penalty": sampling.presence_penalty,
                "gen_ai.request.seed": sampling.seed,
                "gen_ai.request.stop_sequences": list(sampling.stop),
                "gen_ai.usage.input_tokens": len(generation.prompt_token_ids),
            }
        )

    def on_placed(self, generation: Generation, server_id: str) -> None:
        """The request was given to an attention server, the first time or again."""
        self._placements += 1
        if self._placements > 1:
            self._metrics.replays.add(1)
        self._span.add_event(
            "placed", {"expertmesh.server_id": server_id, "expertmesh.output_tokens": len(generation.output_token_ids)}
        )

    def on_response(self, generation: Generation, response: generate_pb2.GenerateResponse) -> None:
        """A message is about to go to the client."""
        num_tokens = len(response.token_ids)
        if num_tokens:
            now_s = generation.last_token_s
            if not self._last_response_s:
                assert generation.first_token_s is not None
                self._metrics.time_to_first_token_seconds.observe(generation.first_token_s - self._started_s)
                self._span.add_event("first_token")
                num_tokens -= 1
                self._last_response_s = generation.first_token_s
            for _ in range(num_tokens):
                self._metrics.inter_token_latency_seconds.observe((now_s - self._last_response_s) / num_tokens)
            self._last_response_s = now_s
        if response.HasField("finish"):
            self._on_finish(response.finish)

    def refused(self, code: grpc.StatusCode, message: str) -> None:
        self._metrics.requests_rejected.add(1, reason=code.name.lower())
        self._fail(code.name, message)

    def abandoned(self, deadline_passed: bool) -> None:
        """The client went away, or its deadline came."""
        self._metrics.request_success.add(1, finished_reason="abort")
        self._fail(
            "DEADLINE_EXCEEDED" if deadline_passed else "CANCELLED",
            "the client's deadline came" if deadline_passed else "",
        )

    def end(self) -> None:
        """The call is over, whatever came of it."""
        if self._inflight:
            self._metrics.router_requests_inflight.add(-1)
        self._span.end()

    def _on_finish(self, finish: generate_pb2.Finish) -> None:
        reason = FINISH_NAMES[finish.reason]
        self._metrics.request_success.add(1, finished_reason=reason)
        self._metrics.e2e_request_latency_seconds.observe(time.monotonic() - self._started_s)
        self._span.set_attributes(
            {
                "gen_ai.response.finish_reasons": [reason],
                "gen_ai.usage.output_tokens": finish.completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": finish.cached_tokens,
                "expertmesh.replays": finish.replays,
            }
        )

    def _fail(self, error_type: str, message: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR, message))
