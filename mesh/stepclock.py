"""Where the time of a step goes: metrics for every step, spans layer by layer for sampled ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from expertmesh.mesh.telemetry import Telemetry, context_from_traceparent, record_span, traceparent_of
from expertmesh.v1 import mesh_pb2


@dataclass(slots=True)
class _LayerMarks:
    """Nanosecond wall times of one exchange: before the dispatch, after it, after compute, after combine."""

    layer: int
    started: int
    dispatched: int
    num_tokens: int
    rows_S: torch.Tensor
    micro_batch: int
    computed: int = 0
    combined: int = 0


class StepClock:
    """Owned by the step thread; one per process, it outlives the views."""

    def __init__(self, telemetry: Telemetry, *, has_experts: bool) -> None:
        self._telemetry = telemetry
        self._has_experts = has_experts
        self._span: Span | None = None  # of the step, where it is sampled
        self._marks: list[_LayerMarks] = []
        self._open: dict[int, _LayerMarks] = {}  # by micro-batch
        self._sent_ns: dict[int, int] = {}
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._started = self._last = now
        self._attention_s = self._dispatch_s = self._compute_s = self._combine_s = 0.0
        self._expert_tokens = 0
        self._marks.clear()
        self._open.clear()
        self._sent_ns.clear()

    def header(self, seconds: float) -> None:
        """The lockstep before a step took so long, waiting for work included."""
        self._telemetry.metrics.header_wait_seconds.observe(seconds)

    def start(self, go: mesh_pb2.StepGo, rank: int) -> str:
        """Returns the traceparent of this rank's span of the step, '' = the step is not sampled."""
        self._reset(time.perf_counter())
        if self._span is not None:
            self._span.set_status(Status(StatusCode.ERROR, "the view broke in the middle of it"))
            self._span.end()
            self._span = None
        if not go.traceparent:
            return ""
        self._span = self._telemetry.tracer.start_span(
            "step",
            context=context_from_traceparent(go.traceparent),
            attributes={
                "expertmesh.step": go.step,
                "expertmesh.rank": rank,
                "expertmesh.step.tokens": sum(go.num_tokens),
                "expertmesh.step.rank_tokens": list(go.num_tokens),
            },
        )
        return traceparent_of(self._span)

    def attention_done(self) -> None:
        now = time.perf_counter()
        self._attention_s += now - self._last
        self._last = now
        self._mark_ns = time.time_ns() if self._span is not None else 0

    def sent(self, micro_batch: int) -> None:
        """The dispatch of a micro-batch has begun, and nobody waits for it yet."""
        now = time.perf_counter()
        self._dispatch_s += now - self._last
        self._last = now
        self._sent_ns[micro_batch] = self._mark_ns

    def dispatched(self, layer: int, num_tokens: int | None, rows_S: torch.Tensor, micro_batch: int = 0) -> None:
        """``num_tokens`` None: only the device knows how many have arrived. ``rows_S``: of each local slot."""
        now = time.perf_counter()
        self._dispatch_s += now - self._last
        self._last = now
        self._expert_tokens += num_tokens or 0
        if self._span is not None:
            started = self._sent_ns.get(micro_batch, self._mark_ns)
            mark = _LayerMarks(layer, started, time.time_ns(), num_tokens or 0, rows_S, micro_batch)
            self._open[micro_batch] = mark
            self._marks.append(mark)

    def computed(self, micro_batch: int = 0) -> None:
        now = time.perf_counter()
        self._compute_s += now - self._last
        self._last = now
        if self._span is not None:
            self._open[micro_batch].computed = time.time_ns()

    def combined(self, micro_batch: int = 0) -> None:
        now = time.perf_counter()
        self._combine_s += now - self._last
        self._last = now
        if self._span is not None:
            self._open[micro_batch].combined = self._mark_ns = time.time_ns()

    def finish(self, num_tokens: int, slots: Mapping[int, Sequence[int]]) -> None:
        """The step is done; ``num_tokens`` over all ranks. ``slots``: what this rank's slots hold, by layer; asked
        for in sampled steps only."""
        metrics = self._telemetry.metrics
        now = time.perf_counter()
        exemplar = traceparent_of(self._span) if self._span is not None else ""
        metrics.step_duration_seconds.observe(now - self._started, exemplar)
        metrics.step_tokens.observe(num_tokens)
        metrics.attention_compute_duration_seconds.observe(self._attention_s)
        metrics.dispatch_duration_seconds.observe(self._dispatch_s)
        metrics.combine_duration_seconds.observe(self._combine_s)
        if self._sent_ns:
            metrics.split_steps.add()
        if self._has_experts:
            metrics.expert_compute_duration_seconds.observe(self._compute_s)
            metrics.expert_rank_tokens.add(self._expert_tokens)
        if self._span is not None:
            self._record_layers(trace.set_span_in_context(self._span), slots)
            self._span.end()
            self._span = None

    def _record_layers(self, parent: Context, slots: Mapping[int, Sequence[int]]) -> None:
        tracer = self._telemetry.tracer
        for mark in self._marks:
            layer = {"expertmesh.layer": mark.layer}
            if self._sent_ns:
                layer["expertmesh.micro_batch"] = mark.micro_batch
            record_span(tracer, "dispatch", parent, mark.started, mark.dispatched, layer)
            if self._has_experts:
                attributes = layer | _loads(mark, slots.get(mark.layer, ()))
                record_span(tracer, "expert_compute", parent, mark.dispatched, mark.computed, attributes)
            record_span(tracer, "combine", parent, mark.computed, mark.combined, layer)


def _loads(mark: _LayerMarks, expert_S: Sequence[int]) -> dict[str, AttributeValue]:
    """What each expert of this rank had to do; a device keeps that to itself, so that no step waits for it."""
    attributes: dict[str, AttributeValue] = {"expertmesh.expert_rank.tokens": mark.num_tokens}
    if mark.rows_S.device.type == "cpu":
        busy = [(expert, rows) for expert, rows in zip(expert_S, mark.rows_S.tolist(), strict=False) if rows]
        attributes["expertmesh.expert.ids"] = [expert for expert, _ in busy]
        attributes["expertmesh.expert.rows"] = [rows for _, rows in busy]
    return attributes
