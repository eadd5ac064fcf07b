"""The spans of one request on an attention server."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from expertmesh.mesh.telemetry import (
    Telemetry,
    context_from_traceparent,
    is_sampled,
    link_to,
    record_span,
    traceparent_of,
)
from expertmesh.v1 import attention_pb2


class RequestTrace:
    """``attention.request``, from the queue to the last token, a child of the router's span.

    Its own children: ``constraint`` and ``kv handover`` where it has them, ``queue``, a ``prefill chunk`` for each step
    that computed some of its prompt, and ``decode``.
    Calls come one at a time; any thread may make them.
    """

    def __init__(self, telemetry: Telemetry, submit: attention_pb2.Submit, *, model: str) -> None:
        params = submit.sampling_params
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "expertmesh",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.seed": params.seed,
            "expertmesh.request_id": submit.request_id,
            "expertmesh.replayed_tokens": len(submit.output_token_ids),
        }
        context = context_from_traceparent(submit.traceparent)
        self._tracer = telemetry.tracer
        self._span = self._tracer.start_span("attention.request", context=context, attributes=attributes)
        self._context = trace.set_span_in_context(self._span)
        self._queued_ns = time.time_ns()
        self._first_token_ns = 0
        self._drafted = self._accepted = 0
        self._chunks: deque[tuple[int, int, int]] = deque()  # under way: first position, end, when it was chosen
        self.traceparent = traceparent_of(self._span)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def prepared(self, what: str, attributes: Mapping[str, AttributeValue]) -> None:
        """``what`` had to be done before it could enter the queue, and is done."""
        now_ns = time.time_ns()
        record_span(self._tracer, what, self._context, self._queued_ns, now_ns, attributes)
        self._queued_ns = now_ns

    def refused(self, error: str) -> None:
        """It ends before it entered the queue."""
        self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

    def started(self) -> None:
        """It has a place in the batch."""
        record_span(self._tracer, "queue", self._context, self._queued_ns, time.time_ns())

    def chunk_launched(self, start: int, end: int, chosen_ns: int) -> None:
        """A step that was put together at ``chosen_ns`` (wall time) computes tokens ``start`` to ``end`` - 1."""
        self._chunks.append((start, end, chosen_ns))

    def chunk_landed(self, end: int) -> None:
        """A step has computed it up to ``end``."""
        if self._chunks and self._chunks[0][1] == end:
            start, _, chosen_ns = self._chunks.popleft()
            tokens = {"expertmesh.chunk.start": start, "expertmesh.chunk.tokens": end - start}
            record_span(self._tracer, "prefill chunk", self._context, chosen_ns, time.time_ns(), tokens)

    def taken_back(self) -> None:
        """Steps that were under way are lost, and will be computed again."""
        self._chunks.clear()

    def first_token(self) -> None:
        self._first_token_ns = time.time_ns()
        self._span.add_event("first token")

    def speculated(self, drafted: int, accepted: int) -> None:
        """A step verified so many drafted tokens."""
        self._drafted += drafted
        self._accepted += accepted

    def link(self, traceparent: str, what: str) -> None:
        """``what`` touched it: a step that it rode in, a migration or a view change."""
        link_to(self._span, traceparent, what)

    def end(self, *, input_tokens: int, output_tokens: int, cached_tokens: int, error: str) -> None:
        """``error`` '' = it ended as asked."""
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": input_tokens,
                "gen_ai.usage.output_tokens": output_tokens,
                "expertmesh.cached_tokens": cached_tokens,
            }
        )
        if self._first_token_ns:
            tokens = {"gen_ai.usage.output_tokens": output_tokens}
            if self._drafted:
                tokens["expertmesh.speculation.drafted_tokens"] = self._drafted
                tokens["expertmesh.speculation.accepted_tokens"] = self._accepted
            record_span(self._tracer, "decode", self._context, self._first_token_ns, time.time_ns(), tokens)
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def trace_request(telemetry: Telemetry, submit: attention_pb2.Submit, *, model: str) -> RequestTrace | None:
    """A span for a sampled request; None when nobody would see it."""
    if telemetry.tracing and is_sampled(submit.traceparent):
        return RequestTrace(telemetry, submit, model=model)
    return None
