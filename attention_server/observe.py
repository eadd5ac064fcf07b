"""Metrics and span events of requests."""

from __future__ import annotations

from expertmesh.attention_server.request import Sequence
from expertmesh.attention_server.scheduler import SchedulerCounts
from expertmesh.mesh.telemetry import Metrics


class RequestMetrics:
    """What an engine reports. Durations are in seconds of the engine's clock and leave replayed tokens out."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._running = metrics.num_requests_running.labels()
        self._waiting = metrics.num_requests_waiting.labels()
        self._kv_usage = metrics.kv_cache_usage_perc.labels()
        self._prompt_tokens = metrics.prompt_tokens.labels()
        self._generation_tokens = metrics.generation_tokens.labels()
        self._iteration_tokens = metrics.iteration_tokens.labels()
        self.num_prefilled = 0  # tokens since the start
        self.num_generated = 0
        self._inter_token = metrics.inter_token_latency_seconds.labels()
        self._drafts = metrics.spec_decode_num_drafts.labels()
        self._draft_tokens = metrics.spec_decode_num_draft_tokens.labels()
        self._accepted_tokens = metrics.spec_decode_num_accepted_tokens.labels()
        self._num_drafted = self._num_accepted = 0
        self._reported = SchedulerCounts()
        self._gaps = 0  # between tokens of a request, since they were taken
        self._gap_s = 0.0

    def load(self, running: int, waiting: int, kv_usage: float) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_usage.set(kv_usage)

    def scheduler(self, counts: SchedulerCounts) -> None:
        """Report what was added to the totals since the last call."""
        if counts == self._reported:
            return
        self._metrics.num_preemptions.add(counts.preemptions - self._reported.preemptions)
        self._metrics.prefix_cache_queries.add(counts.prefix_queries - self._reported.prefix_queries)
        self._metrics.prefix_cache_hits.add(counts.prefix_hits - self._reported.prefix_hits)
        self._reported = SchedulerCounts(counts.preemptions, counts.prefix_queries, counts.prefix_hits)

    def computed(self, prefilled: int, generated: int) -> None:
        """What a step did, in tokens."""
        self._prompt_tokens.add(prefilled)
        self._generation_tokens.add(generated)
        self.num_prefilled += prefilled
        self.num_generated += generated

    def step(self, num_tokens: int) -> None:
        """A step began, with so many tokens."""
        self._iteration_tokens.observe(num_tokens)

    def speculated(self, drafted: int, accepted: int) -> None:
        """A draft was verified; in tokens."""
        self._num_drafted += drafted
        self._num_accepted += accepted
        self._drafts.add(1)
        self._draft_tokens.add(drafted)
        self._accepted_tokens.add(accepted)
        self._metrics.spec_decode_acceptance_rate.set(self._num_accepted / self._num_drafted)

    def started(self, sequence: Sequence, now: float) -> None:
        """It runs, for the first time or again after a preemption."""
        if sequence.admitted_s:
            if sequence.trace is not None:
                sequence.trace.event("resumed after a preemption")
            return
        sequence.admitted_s = now
        self._metrics.request_queue_time_seconds.observe(now - sequence.queued_s, _exemplar(sequence))
        if sequence.trace is not None:
            sequence.trace.started()

    def token(self, sequence: Sequence, now: float) -> None:
        if sequence.last_token_s:
            self._inter_token.observe(now - sequence.last_token_s, _exemplar(sequence))
            self._gaps += 1
            self._gap_s += now - sequence.last_token_s
        else:
            sequence.first_token_s = now
            self._metrics.request_prefill_time_seconds.observe(now - sequence.admitted_s, _exemplar(sequence))
            self._metrics.time_to_first_token_seconds.observe(now - sequence.queued_s, _exemplar(sequence))
            if sequence.trace is not None:
                sequence.trace.first_token()
        sequence.last_token_s = now

    def take_token_s(self) -> float:
        """The mean time between two tokens of a request since the call before; 0 = there were none."""
        gaps, gap_s = self._gaps, self._gap_s
        self._gaps, self._gap_s = 0, 0.0
        return gap_s / gaps if gaps else 0.0

    def ended(self, sequence: Sequence, now: float, error: str) -> None:
        """``error`` '' = it ended as asked."""
        metrics, exemplar = self._metrics, _exemplar(sequence)
        if sequence.first_token_s:
            decode_s, num_output = now - sequence.first_token_s, sequence.num_known_output
            metrics.request_decode_time_seconds.observe(decode_s, exemplar)
            metrics.request_inference_time_seconds.observe(now - sequence.admitted_s, exemplar)
            metrics.request_prompt_tokens.observe(sequence.num_prompt)
            metrics.request_generation_tokens.observe(num_output)
            if num_output > 1:
                metrics.request_time_per_output_token_seconds.observe(decode_s / (num_output - 1), exemplar)
        metrics.e2e_request_latency_seconds.observe(now - sequence.queued_s, exemplar)
        if sequence.trace is not None:
            sequence.trace.end(
                input_tokens=sequence.num_prompt,
                output_tokens=sequence.num_output,
                cached_tokens=sequence.cached_tokens,
                error=error,
            )


def _exemplar(sequence: Sequence) -> str:
    """What a histogram may point to: the request's span, where it has one."""
    return sequence.trace.traceparent if sequence.trace is not None else ""
