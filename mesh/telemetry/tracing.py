"""W3C trace context in and out of gRPC metadata and protobuf strings, and spans from plain timestamps.

Needs the OpenTelemetry API only. OpenTelemetry's interceptors for grpc.aio are not used: they lose the span of a call
that is cancelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

Metadata = Iterable[tuple[str, str | bytes]]

_PROPAGATOR = TraceContextTextMapPropagator()
_TRACEPARENT_LENGTH = 55

CONTROL_SPANS = frozenset({"migration", "view_change", "failure"})
"""Roots of the traces that no request begins; they are sampled by a ratio of their own."""


def extract_context(metadata: Metadata | None) -> Context:
    """The caller's context from invocation metadata; an empty one when there is none or it is malformed."""
    carrier = {key: value for key, value in metadata or () if isinstance(value, str) and key in _PROPAGATOR.fields}
    return _PROPAGATOR.extract(carrier, Context())


def inject_metadata(metadata: Metadata = (), context: Context | None = None) -> tuple[tuple[str, str | bytes], ...]:
    """``metadata`` with the trace context (of ``context``, else the current one) added, for an outgoing call."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, context)
    return (*metadata, *carrier.items())


def traceparent_of(span: Span) -> str:
    """The span's W3C ``traceparent``, or '' for a span that belongs to no trace."""
    context = span.get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 0xFF:02x}"


def context_from_traceparent(traceparent: str) -> Context:
    """A context whose parent span is remote; an empty one for '' or a malformed string."""
    return _PROPAGATOR.extract({"traceparent": traceparent}, Context()) if traceparent else Context()


def is_sampled(traceparent: str) -> bool:
    """Whether the sampled flag is set; False for '' and malformed strings."""
    if len(traceparent) < _TRACEPARENT_LENGTH:
        return False
    return trace.get_current_span(context_from_traceparent(traceparent)).get_span_context().trace_flags.sampled


def record_span(
    tracer: Tracer,
    name: str,
    context: Context | None,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Span:
    """A finished span from two ``time.time_ns()`` stamps, so that a hot path takes stamps only.

    Returns it, so that children can be recorded under ``trace.set_span_in_context(span)``.
    """
    span = tracer.start_span(name, context=context, kind=kind, attributes=attributes, start_time=start_ns)
    span.end(end_ns)
    return span


def link_to(span: Span, traceparent: str, what: str, **attributes: AttributeValue) -> None:
    """Link ``span`` to a sampled span of another trace (or of its own): ``what`` is step, migration or view_change."""
    if is_sampled(traceparent):
        other = trace.get_current_span(context_from_traceparent(traceparent)).get_span_context()
        span.add_link(other, {"expertmesh.link": what, **attributes})
