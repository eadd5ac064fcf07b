"""The parts of a rank's way into a view: how long they took, and their spans in the trace of the view change."""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from expertmesh.mesh.telemetry import Telemetry, context_from_traceparent, is_sampled, record_span
from expertmesh.mesh.view import ViewInfo


class ViewTrace:
    """``enter view`` from its construction to ``end``, with a child for each part that is ``done``.

    Args:
        broken_ns: wall time when the view before broke; 0 = it ended in good order.
    """

    def __init__(self, telemetry: Telemetry, view: ViewInfo, broken_ns: int) -> None:
        self._tracer = telemetry.tracer
        self._is_sampled = telemetry.tracing and is_sampled(view.proto.traceparent)
        self._part_ns = time.time_ns()
        self._parts: list[tuple[str, float]] = []
        self._broken_ns = broken_ns
        if self._is_sampled:
            self._context = context_from_traceparent(view.proto.traceparent)
            attributes = {"expertmesh.view": view.number, "expertmesh.rank": view.rank}
            self._span = self._tracer.start_span("enter view", context=self._context, attributes=attributes)

    def done(self, part: str) -> None:
        now_ns = time.time_ns()
        self._parts.append((part, 1e-9 * (now_ns - self._part_ns)))
        if self._is_sampled:
            record_span(self._tracer, part, trace.set_span_in_context(self._span), self._part_ns, now_ns)
        self._part_ns = now_ns

    def __str__(self) -> str:
        """The parts that are done and their seconds."""
        return ", ".join(f"{part} {seconds:.2f}" for part, seconds in self._parts)

    def end(self, error: str = "") -> None:
        """The rank steps in the view, or it broke before that. Once more, later, changes nothing."""
        if not self._is_sampled:
            return
        self._is_sampled = False
        if error:
            self._span.set_status(Status(StatusCode.ERROR, error))
        elif self._broken_ns:
            record_span(self._tracer, "interruption", self._context, self._broken_ns, time.time_ns())
        self._span.end()
