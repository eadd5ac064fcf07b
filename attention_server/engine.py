"""The life of every sequence on a server, from a router's message to its last token.

The event loop posts events; the step thread takes them up at its next ``prepare`` and runs the steps. While no step
comes (the rank is in no view), ``tick`` on the event loop's thread does the bookkeeping. One lock covers the state; it
is never held while a step computes.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np

from expertmesh.attention_server.drafting import Drafter
from expertmesh.attention_server.kv_cache import BlockManager, chain_digests
from expertmesh.attention_server.observe import RequestMetrics
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.attention_server.request import RefusedError, Sequence, SequenceState
from expertmesh.attention_server.sampler import Logprobs, Sampled
from expertmesh.attention_server.scheduler import Chunk, LaunchedChunk, Limits, Scheduler, SchedulerCounts
from expertmesh.v1 import generate_pb2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Abort:
    """The router no longer wants a sequence."""

    link: int
    handle: int


@dataclass(frozen=True, slots=True)
class Unlink:
    """A link is gone, and with it the reader of all its sequences."""

    link: int


@dataclass(frozen=True, slots=True)
class EndAll:
    """Every sequence ends with a status."""

    code: grpc.StatusCode
    message: str


Event = Sequence | Abort | Unlink | EndAll


@dataclass(frozen=True, slots=True)
class Output:
    """What a step did for a sequence. ``token`` None = nothing new; ``code`` other than OK ends it with ``message``.

    ``cached_tokens``: said with the first token and the last one.
    """

    link: int
    handle: int
    token: int | None = None
    logprobs: Logprobs | None = None
    finish: generate_pb2.FinishReason.ValueType = generate_pb2.FINISH_REASON_UNSPECIFIED
    matched_id: int | None = None
    cached_tokens: int = 0
    code: grpc.StatusCode = grpc.StatusCode.OK
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Load:
    """A server's state at one moment; ``kv_cache_usage`` 0 .. 1."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_kv_blocks: int
    outstanding_tokens: int
    serving: bool


class Engine:
    """Sequences, their scheduling and their ends.

    Args:
        clock: monotonic seconds.
        on_start, on_stop: called on the step thread when a sequence gets or loses its place in the batch (a loss also
            from ``tick``).
        drafter: see ``Scheduler``; only for steps that are completed before the next one is prepared.
    """

    def __init__(
        self,
        limits: Limits,
        blocks: BlockManager,
        metrics: RequestMetrics,
        clock: Callable[[], float],
        *,
        on_start: Callable[[Sequence], None],
        on_stop: Callable[[Sequence], None],
        drafter: Drafter | None = None,
    ) -> None:
        self._blocks = blocks
        self._metrics = metrics
        self._clock = clock
        self._place = on_start
        self._scheduler = Scheduler(limits, blocks, on_start=self._started, on_stop=on_stop, drafter=drafter)
        self._lock = threading.Lock()
        self.prefixes = PrefixDesk(blocks, self._lock)
        self._block_size = limits.block_size
        self._inbox: deque[Event] = deque()
        self._active: dict[tuple[int, int], Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self._prepared: list[Chunk] = []
        self._prepared_ns = 0  # wall time
        self._dropped: list[Sequence] = []
        self._outputs: list[Output] = []
        self._serving = False
        self._wake: Callable[[], None] | None = None
        self._sink: Callable[[list[Output], Load], None] | None = None

    def set_waker(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def set_sink(self, sink: Callable[[list[Output], Load], None] | None) -> None:
        """``sink`` is thread-safe and takes what each step did, and the load after it."""
        self._sink = sink

    @property
    def num_active(self) -> int:
        """Sequences that have not ended, and events not taken up yet."""
        return len(self._active) + len(self._inbox)

    @property
    def counts(self) -> SchedulerCounts:
        return self._scheduler.counts

    def prefix_digests(self, sequence: Sequence) -> list[bytes]:
        """Of the full blocks that a sequence, before it is posted, could find in the cache."""
        num_tokens = sequence.num_tokens - 1  # the last one is computed: its logits are what the sequence comes for
        chain_digests(sequence.tokens, self._block_size, sequence.digests, num_tokens)
        return sequence.digests

    def post(self, event: Event) -> None:
        """From any thread."""
        self._inbox.append(event)
        if self._wake is not None:
            self._wake()

    def set_serving(self, serving: bool) -> None:
        with self._lock:
            self._serving = serving
        self._publish()

    def load(self) -> Load:
        with self._lock:
            return self._load()

    @property
    def num_computed_tokens(self) -> tuple[int, int]:
        """Since the start: of prompts, and generated."""
        return self._metrics.num_prefilled, self._metrics.num_generated

    def link_all(self, traceparent: str, what: str) -> None:
        """``what``, whose trace it is, touched every traced sequence that has not ended. From the step thread."""
        with self._lock:
            for sequence in self._active.values():
                if sequence.trace is not None:
                    sequence.trace.link(traceparent, what)

    def link_batch(self, traceparent: str) -> None:
        """The traced sequences of the prepared batch ride in the step whose trace it is. From the step thread."""
        with self._lock:
            for chunk in self._prepared:
                if chunk.sequence.trace is not None:
                    chunk.sequence.trace.link(traceparent, "step")

    def take_token_s(self) -> float:
        """See ``RequestMetrics``."""
        with self._lock:
            return self._metrics.take_token_s()

    def tick(self) -> None:
        """Take up events and deadlines without a step; from any thread."""
        with self._lock:
            self._collect()
        self._publish()

    def can_go_on(self) -> bool:
        """Whether a step can be prepared while one is under way: not where somebody would lose its blocks."""
        with self._lock:
            return self._scheduler.has_room_to_go_on()

    def prepare(self) -> tuple[list[Chunk], bool]:
        """The chunks of the next step, and whether they are other than those of the call before."""
        with self._lock:
            self._collect()
            if self._prepared and not self._dropped:
                return self._prepared, False
            self._unprepare()
            chunks, outgrown = self._scheduler.schedule()
            while outgrown:
                for sequence in outgrown:
                    self._end(sequence, grpc.StatusCode.RESOURCE_EXHAUSTED, self._outgrown_message(sequence))
                chunks, outgrown = self._scheduler.schedule()
            # Sequences with as many tokens and about as much context side by side make few attention groups.
            chunks.sort(key=_attention_order)
            for chunk in chunks:
                chunk.sequence.in_batch = True
            self._prepared, self._prepared_ns = chunks, time.time_ns()
            self._metrics.scheduler(self._scheduler.counts)
        if self._outputs:
            self._publish()
        return chunks, True

    def complete(self, chunks: list[Chunk], sampled: Sampled) -> None:
        """The prepared step is computed; ``sampled`` has the tokens of each chunk that completes, in their order."""
        self.land(self.launch(chunks), sampled)

    def launch(self, chunks: list[Chunk]) -> list[LaunchedChunk]:
        """The prepared step is under way: the next one may be prepared."""
        with self._lock:
            assert chunks is self._prepared, "a step other than the prepared one was computed"
            prefilled = sum([chunk.count for chunk in chunks if chunk.is_prefill])
            self._trace_chunks(chunks)
            launched = self._scheduler.launch(chunks)
            self.prefixes.step_launched()
            self._metrics.step(sum([chunk.count for chunk in chunks]))
            self._metrics.computed(prefilled, sum([chunk.completes for chunk in launched]))
            self._unprepare()
        return launched

    def land(self, launched: list[LaunchedChunk], sampled: Sampled) -> None:
        """A launched step is computed; steps land in the order of their launches.

        What a sequence that has ended meanwhile computed is dropped: its blocks may be others' by now, but only for
        steps behind this one.
        """
        now = self._clock()
        with self._lock:
            self._scheduler.land(launched)
            self.prefixes.step_landed()
            for chunk in launched:
                if chunk.sequence.trace is not None:
                    chunk.sequence.trace.chunk_landed(chunk.end)
            completing = [chunk for chunk in launched if chunk.completes]
            tokens = enumerate(sampled.tokens.tolist())
            if sampled.counts is None:
                for chunk, (index, token) in zip(completing, tokens, strict=True):
                    if chunk.sequence.state is not SequenceState.ENDED:
                        self._answer(chunk.sequence, token, sampled.logprobs.get(index), now)
            else:
                for chunk, count in zip(completing, sampled.counts, strict=True):
                    self._answer_all(chunk, list(itertools.islice(tokens, count)), sampled.logprobs, now)
        self._publish()

    def _answer_all(
        self, chunk: LaunchedChunk, tokens: list[tuple[int, int]], logprobs: dict[int, Logprobs], now: float
    ) -> None:
        """The tokens that a chunk gave, numbered as ``logprobs`` are; those behind the sequence's end are dropped."""
        sequence, num_accepted = chunk.sequence, len(tokens) - 1
        if sequence.state is SequenceState.ENDED:
            return
        if chunk.num_drafted:
            sequence.extend(num_accepted)
            self._metrics.speculated(chunk.num_drafted, num_accepted)
            if sequence.trace is not None:
                sequence.trace.speculated(chunk.num_drafted, num_accepted)
        for num_more, (index, token) in enumerate(tokens):
            if self._answer(sequence, token, logprobs.get(index), now):
                num_accepted = num_more
                break
        if num_accepted:
            self._metrics.computed(0, num_accepted)

    def take_back(self, launched: list[LaunchedChunk]) -> None:
        """A launched step is lost and will be computed again; steps are taken back from the last one on."""
        with self._lock:
            self._unprepare()
            self._scheduler.take_back(launched)
            self.prefixes.step_landed()
            for chunk in launched:
                if chunk.sequence.trace is not None:
                    chunk.sequence.trace.taken_back()

    def _trace_chunks(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            trace, start = chunk.sequence.trace, chunk.sequence.num_computed
            if trace is not None and chunk.is_prefill:
                trace.chunk_launched(start, start + chunk.count, self._prepared_ns)

    def _collect(self) -> None:
        while self._inbox:
            event = self._inbox.popleft()
            match event:
                case Sequence():
                    self._accept(event)
                case Abort():
                    sequence = self._active.get((event.link, event.handle))
                    if sequence is not None:
                        self._drop(sequence, "aborted")
                case Unlink():
                    for sequence in [s for s in self._active.values() if s.link == event.link]:
                        self._drop(sequence, "the router's link broke")
                case EndAll():
                    for sequence in list(self._active.values()):
                        self._end(sequence, event.code, event.message)
        now = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if self._active.get((sequence.link, sequence.handle)) is sequence:
                message = f"the deadline of {sequence.timeout_s:.3g} s passed after {sequence.num_output} output tokens"
                self._end(sequence, grpc.StatusCode.DEADLINE_EXCEEDED, message)

    def _accept(self, sequence: Sequence) -> None:
        key = (sequence.link, sequence.handle)
        try:
            if key in self._active:
                raise RefusedError(grpc.StatusCode.ALREADY_EXISTS, f"handle {sequence.handle} is in use on this link")
            self._scheduler.add(sequence)
        except RefusedError as refusal:
            log.info("request %s refused: %s", sequence.request_id, refusal)
            self._outputs.append(Output(sequence.link, sequence.handle, code=refusal.code, message=str(refusal)))
            self._metrics.ended(sequence, self._clock(), str(refusal))
            return
        self._active[key] = sequence
        if sequence.timeout_s > 0:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.serial, sequence))

    def _started(self, sequence: Sequence) -> None:
        self._place(sequence)
        self._metrics.started(sequence, self._clock())

    def _answer(self, sequence: Sequence, token: int, logprobs: Logprobs | None, now: float) -> bool:
        """Whether the token ends the sequence."""
        sequence.fill(token)
        is_first = not sequence.last_token_s
        self._metrics.token(sequence, now)
        finish, matched_id = generate_pb2.FINISH_REASON_UNSPECIFIED, None
        ends = token in sequence.sampling.end_ids and sequence.num_known_output >= sequence.sampling.min_tokens
        matcher = sequence.matcher
        if matcher is not None and not ends:
            matcher.accept(token)
        if matcher is not None and matcher.problem:
            self._end(sequence, grpc.StatusCode.INVALID_ARGUMENT, matcher.problem)
            return True
        if ends:
            finish, matched_id = generate_pb2.FINISH_REASON_STOP, token
        elif matcher is not None and matcher.must_end:
            finish = generate_pb2.FINISH_REASON_STOP
        elif sequence.num_tokens == len(sequence.tokens) and not sequence.num_pending:
            finish = generate_pb2.FINISH_REASON_LENGTH
        cached_tokens = sequence.cached_tokens if is_first or finish else 0
        self._outputs.append(Output(sequence.link, sequence.handle, token, logprobs, finish, matched_id, cached_tokens))
        if finish:
            self._drop(sequence, "")
        return bool(finish)

    def _end(self, sequence: Sequence, code: grpc.StatusCode, message: str) -> None:
        self._outputs.append(
            Output(sequence.link, sequence.handle, cached_tokens=sequence.cached_tokens, code=code, message=message)
        )
        self._drop(sequence, message)

    def _drop(self, sequence: Sequence, error: str) -> None:
        """Forget a sequence. Its blocks stay while a prepared step may write to them."""
        del self._active[(sequence.link, sequence.handle)]
        sequence.num_tokens -= sequence.num_pending
        sequence.num_pending = 0
        self._metrics.ended(sequence, self._clock(), error)
        if sequence.in_batch:
            sequence.dropped = True
            self._dropped.append(sequence)
        else:
            self._scheduler.remove(sequence)

    def _unprepare(self) -> None:
        for chunk in self._prepared:
            chunk.sequence.in_batch = False
        self._prepared = []
        for sequence in self._dropped:
            self._scheduler.remove(sequence)
        self._dropped = []

    def _outgrown_message(self, sequence: Sequence) -> str:
        return (
            f"{sequence.num_tokens} tokens filled the whole KV cache ({self._blocks.num_blocks} blocks): ask for fewer "
            "tokens, or raise attention.num_kv_blocks or attention.kv_cache_bytes"
        )

    def _load(self) -> Load:
        load = Load(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            kv_cache_usage=self._blocks.usage,
            num_kv_blocks=self._blocks.num_blocks,
            outstanding_tokens=self._scheduler.outstanding_tokens,
            serving=self._serving,
        )
        self._metrics.load(load.num_running, load.num_waiting, load.kv_cache_usage)
        return load

    def _publish(self) -> None:
        if self._sink is None:
            return
        with self._lock:
            outputs, self._outputs = self._outputs, []
            self._sink(outputs, self._load())


def _attention_order(chunk: Chunk) -> tuple[int, int]:
    return (chunk.num_rows, chunk.sequence.num_computed)


def no_samples() -> Sampled:
    return Sampled(np.empty(0, np.int64), {})
