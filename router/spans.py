"""Span and metrics of one request, with the attributes of OpenTelemetry's GenAI semantic conventions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from expertmesh.mesh.telemetry import Telemetry, extract_context, inject_metadata, link_to, record_span, traceparent_of
from expertmesh.mesh.telemetry.instruments import HistogramCell
from expertmesh.mesh.telemetry.tracing import Metadata
from expertmesh.router.generation import Generation
from expertmesh.router.slo import Objectives
from expertmesh.v1 import generate_pb2

FINISH_NAMES = {
    generate_pb2.FINISH_REASON_STOP: "stop",
    generate_pb2.FINISH_REASON_LENGTH: "length",
    generate_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


@dataclass
class RequestTotals:
    """What a router has seen since its start, for its heartbeats; ``ttfts`` since they were taken."""

    ended: int = 0
    failed: int = 0
    ttfts: int = 0
    ttft_s: float = 0.0

    def take_ttft_s(self) -> float:
        """The mean time to the first token since the call before; 0 = there was none."""
        mean_s = self.ttft_s / self.ttfts if self.ttfts else 0.0
        self.ttfts, self.ttft_s = 0, 0.0
        return mean_s


class TokenGaps:
    """Times between tokens of all requests, told to their histogram once for all that come with a step."""

    def __init__(self, cell: HistogramCell) -> None:
        self._cell = cell
        self._gaps_s: list[float] = []

    def add(self, gap_s: float, count: int) -> None:
        """``count`` tokens, each so long after the one before it."""
        if not self._gaps_s:
            asyncio.get_running_loop().call_soon(self._tell)
        if count == 1:
            self._gaps_s.append(gap_s)
        else:
            self._gaps_s.extend([gap_s] * count)

    def _tell(self) -> None:
        gaps_s, self._gaps_s = self._gaps_s, []
        self._cell.observe_all(gaps_s)


@dataclass(frozen=True, kw_only=True)
class RequestObserver:
    """What the telemetry of all requests of a router shares. ``model``: as the mesh names it."""

    telemetry: Telemetry
    model: str
    objectives: Objectives
    gaps: TokenGaps
    totals: RequestTotals = field(default_factory=RequestTotals)


@contextmanager
def around_choices(observer: RequestObserver, metadata: Metadata | None, count: int) -> Iterator[Metadata]:
    """A server span around the ``count`` choices of one answer, so that they are in one trace even where the client
    sends none. Yields what stands for ``metadata`` in each of them."""
    with observer.telemetry.tracer.start_as_current_span(
        f"choices {observer.model}",
        context=extract_context(metadata),
        kind=SpanKind.SERVER,
        attributes={"expertmesh.choices": count},
        record_exception=False,
    ):
        yield inject_metadata()


class RequestTelemetry:
    """A server span from arrival to ``end``, a child of the client's span where it sent one, with a span for each
    thing that the router does before the request has an attention server.

    Args:
        metadata: of the call; may carry a W3C trace context.
    """

    def __init__(self, observer: RequestObserver, *, operation: str, metadata: Metadata | None) -> None:
        telemetry, model = observer.telemetry, observer.model
        self._observer = observer
        self._tracer = telemetry.tracer
        self._metrics = telemetry.metrics
        self._started_s = time.monotonic()
        self._inflight = False
        self._replays = 0  # when it got the server that it had last
        self._prefilled = False  # by that server
        self._left = ""
        self._choosing_ns = 0
        self._phase_ns = time.time_ns()  # when what the router does now began
        self._span = telemetry.tracer.start_span(
            f"generate {model}",
            context=extract_context(metadata),
            kind=SpanKind.SERVER,
            start_time=self._phase_ns,
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
        self._record_phase("admission", self._phase_ns, {})

    def on_tokenised(self, num_tokens: int) -> None:
        """Its prompt has so many tokens."""
        self._record_phase("tokenise", self._phase_ns, {"gen_ai.usage.input_tokens": num_tokens})

    def on_constraint_checked(self, kind: str) -> None:
        """The constraint on its output compiles."""
        self._span.set_attribute("expertmesh.constraint", kind)
        self._record_phase("constraint", self._phase_ns, {"expertmesh.constraint": kind})

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

    def on_homeless(self, server_id: str) -> None:
        """The request is at ``server_id`` no more: that was lost, took nothing new, or has computed the prompt."""
        self._left = server_id
        self._phase_ns = time.time_ns()

    def on_choosing(self) -> None:
        """An attention server is about to be chosen, perhaps in vain."""
        self._choosing_ns = time.time_ns()

    def on_placed(self, generation: Generation, server_id: str, num_serving: int) -> None:
        """The request was given to one of ``num_serving`` attention servers, the first time or again."""
        phase = self._what_ends(generation)
        self._replays, self._prefilled = generation.replays, generation.is_prefilling
        if phase == "replay":
            self._metrics.replays.add(1)
        if not self._span.is_recording():
            return
        attributes: dict[str, AttributeValue] = {
            "expertmesh.server_id": server_id,
            "expertmesh.servers_serving": num_serving,
            "expertmesh.output_tokens": len(generation.output_token_ids),
        }
        if generation.is_prefilling:
            attributes["expertmesh.prefill"] = True  # that server belongs to the mesh that computes prompts
        began_ns, chosen_ns = self._phase_ns, time.time_ns()
        if phase == "queue":  # until the choice that found a server; the others last until it has the request
            self._record_phase(phase, began_ns, {}, self._choosing_ns)
        else:
            attributes["expertmesh.from_server_id"] = self._left
            self._record_phase(phase, began_ns, {**attributes, "expertmesh.replays": generation.replays})
        self._record_phase("choose attention server", self._choosing_ns, attributes, chosen_ns)

    def _what_ends(self, generation: Generation) -> str:
        """What the request was in until it got a server: a queue, at first or after a server that took nothing new; a
        replay, after a server that was lost; or a handover from the mesh that has computed its prompt."""
        if generation.replays > self._replays:
            return "replay"
        return "handover" if self._prefilled and generation.kv_source is not None else "queue"

    def on_view_changed(self, traceparent: str) -> None:
        """The view that the request began under is not the one that it ended under."""
        link_to(self._span, traceparent, "view_change")

    def on_first_token(self, now_s: float) -> None:
        """It has come, ``now_s`` on ``time.monotonic``."""
        ttft_s = now_s - self._started_s
        self._metrics.time_to_first_token_seconds.observe(ttft_s, self._exemplar)
        self._observer.totals.ttfts += 1
        self._observer.totals.ttft_s += ttft_s
        self._span.add_event("first_token")

    @property
    def on_gap(self) -> Callable[[float, int], None]:
        """Takes the mean time between so many tokens: for all of a step at once, except where a trace is pointed to."""
        return self._observe_gap if self._span.is_recording() else self._observer.gaps.add

    def _observe_gap(self, gap_s: float, count: int) -> None:
        for _ in range(count):
            self._metrics.inter_token_latency_seconds.observe(gap_s, self._exemplar)

    def refused(self, code: grpc.StatusCode, message: str) -> None:
        self._metrics.requests_rejected.add(1, reason=code.name.lower())
        self._observer.totals.failed += 1
        self._observer.objectives.refused(code)
        self._fail(code.name, message)

    def abandoned(self, deadline_passed: bool) -> None:
        """The client went away, or its deadline came."""
        self._metrics.request_success.add(1, finished_reason="abort")
        if deadline_passed:
            self._observer.objectives.refused(grpc.StatusCode.DEADLINE_EXCEEDED)
        self._fail(
            "DEADLINE_EXCEEDED" if deadline_passed else "CANCELLED",
            "the client's deadline came" if deadline_passed else "",
        )

    def end(self) -> None:
        """The call is over, whatever came of it."""
        if self._inflight:
            self._metrics.router_requests_inflight.add(-1)
        self._span.end()

    @property
    def _exemplar(self) -> str:
        """What a histogram may point to: nothing where the span is not kept."""
        return self.traceparent if self._span.is_recording() else ""

    def _record_phase(
        self, name: str, began_ns: int, attributes: dict[str, AttributeValue], ended_ns: int | None = None
    ) -> None:
        """A child from ``began_ns`` until now (or ``ended_ns``), where the next phase begins."""
        self._phase_ns = time.time_ns() if ended_ns is None else ended_ns
        if self._span.is_recording():
            parent = trace.set_span_in_context(self._span)
            record_span(self._tracer, name, parent, began_ns, self._phase_ns, attributes)

    def on_finish(self, generation: Generation, finish: generate_pb2.Finish) -> None:
        """The last message is about to go to the client."""
        reason = FINISH_NAMES[finish.reason]
        e2e_s = time.monotonic() - self._started_s
        self._metrics.request_success.add(1, finished_reason=reason)
        self._metrics.e2e_request_latency_seconds.observe(e2e_s, self._exemplar)
        self._observer.totals.ended += 1
        if finish.reason != generate_pb2.FINISH_REASON_CANCELLED and generation.first_token_s is not None:
            ttft_s = generation.first_token_s - self._started_s
            decode_s = generation.last_token_s - generation.first_token_s
            self._observer.objectives.ended(ttft_s, decode_s, finish.completion_tokens)
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
