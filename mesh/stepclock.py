"""Where the time of a step goes: metrics for every step, spans layer by layer for sampled ones."""

from __future__ import annotations

import time
from dataclasses import dataclass

from opentelemetry import trace

from expertmesh.mesh.telemetry import Telemetry, context_from_traceparent, record_span
from expertmesh.v1 import mesh_pb2


@dataclass(slots=True)
class _LayerMarks:
    """Nanosecond wall times of one exchange: before the dispatch, after it, after compute, after combine."""

    layer: int
    started: int
    dispatched: int
    num_tokens: int
    computed: int = 0
    combined: int = 0


class StepClock:
    """Owned by the step thread; one per process, it outlives the views."""

    def __init__(self, telemetry: Telemetry, *, has_experts: bool) -> None:
        self._telemetry = telemetry
        self._has_experts = has_experts
        self._traceparent = ""
        self._marks: list[_LayerMarks] = []
        self._reset(0.0)
        self._step = 0

    def _reset(self, now: float) -> None:
        self._started = self._last = now
        self._attention_s = self._dispatch_s = self._compute_s = self._combine_s = 0.0
        self._expert_tokens = 0
        self._marks.clear()

    def header(self, seconds: float) -> None:
        """The lockstep before a step took so long, waiting for work included."""
        self._telemetry.metrics.header_wait_seconds.observe(seconds)

    def start(self, go: mesh_pb2.StepGo) -> None:
        self._reset(time.perf_counter())
        self._step = go.step
        self._traceparent = go.traceparent
        self._started_ns = time.time_ns() if go.traceparent else 0

    def attention_done(self) -> None:
        now = time.perf_counter()
        self._attention_s += now - self._last
        self._last = now
        self._mark_ns = time.time_ns() if self._traceparent else 0

    def dispatched(self, layer: int, num_tokens: int | None) -> None:
        """``num_tokens`` None: only the device knows how many have arrived."""
        now = time.perf_counter()
        self._dispatch_s += now - self._last
        self._last = now
        self._expert_tokens += num_tokens or 0
        if self._traceparent:
            self._marks.append(_LayerMarks(layer, self._mark_ns, time.time_ns(), num_tokens or 0))

    def computed(self) -> None:
        now = time.perf_counter()
        self._compute_s += now - self._last
        self._last = now
        if self._traceparent:
            self._marks[-1].computed = time.time_ns()

    def combined(self) -> None:
        now = time.perf_counter()
        self._combine_s += now - self._last
        self._last = now
        if self._traceparent:
            self._marks[-1].combined = self._mark_ns = time.time_ns()

    def finish(self, num_tokens: int) -> None:
        """The step is done; ``num_tokens`` over all ranks."""
        metrics = self._telemetry.metrics
        now = time.perf_counter()
        metrics.step_duration_seconds.observe(now - self._started)
        metrics.step_tokens.observe(num_tokens)
        metrics.attention_compute_duration_seconds.observe(self._attention_s)
        metrics.dispatch_duration_seconds.observe(self._dispatch_s)
        metrics.combine_duration_seconds.observe(self._combine_s)
        if self._has_experts:
            metrics.expert_compute_duration_seconds.observe(self._compute_s)
            metrics.expert_rank_tokens.add(self._expert_tokens)
        if self._traceparent:
            self._record_spans(num_tokens)

    def _record_spans(self, num_tokens: int) -> None:
        tracer = self._telemetry.tracer
        span = record_span(
            tracer,
            "step",
            context_from_traceparent(self._traceparent),
            self._started_ns,
            time.time_ns(),
            {"expertmesh.step": self._step, "expertmesh.step.tokens": num_tokens},
        )
        parent = trace.set_span_in_context(span)
        for mark in self._marks:
            layer = {"expertmesh.layer": mark.layer}
            record_span(tracer, "dispatch", parent, mark.started, mark.dispatched, layer)
            if self._has_experts:
                attributes = {**layer, "expertmesh.expert_rank.tokens": mark.num_tokens}
                record_span(tracer, "expert_compute", parent, mark.dispatched, mark.computed, attributes)
            record_span(tracer, "combine", parent, mark.computed, mark.combined, layer)
