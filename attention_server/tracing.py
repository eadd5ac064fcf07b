"""The span of one request on an attention server."""

from __future__ import annotations

from opentelemetry.trace import Status, StatusCode
from opentelemetry.util.types import AttributeValue

from expertmesh.mesh.telemetry import Telemetry, context_from_traceparent, is_sampled, traceparent_of
from expertmesh.v1 import attention_pb2


class RequestTrace:
    """``attention.request``, from the queue to the last token, a child of the router's span. Any thread may use it."""

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
        self._span = telemetry.tracer.start_span("attention.request", context=context, attributes=attributes)
        self._span.add_event("queued")
        self.traceparent = traceparent_of(self._span)

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, *, input_tokens: int, output_tokens: int, cached_tokens: int, error: str) -> None:
        """``error`` '' = it ended as asked."""
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": input_tokens,
                "gen_ai.usage.output_tokens": output_tokens,
                "expertmesh.cached_tokens": cached_tokens,
            }
        )
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()


def trace_request(telemetry: Telemetry, submit: attention_pb2.Submit, *, model: str) -> RequestTrace | None:
    """A span for a sampled request; None when nobody would see it."""
    if telemetry.tracing and is_sampled(submit.traceparent):
        return RequestTrace(telemetry, submit, model=model)
    return None
