"""The life of every sequence on a server, from a router's message to its last token.

The event loop posts events; the step thread takes them up at its next ``prepare`` and runs the steps. While no step
comes (the rank is in no view), ``tick`` on the event loop's thread does the bookkeeping. One lock covers the state; it
is never held while a step computes.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable

import grpc

from expertmesh.attention_server.active import ActiveSequences
from expertmesh.attention_server.chunk import Chunk, LaunchedChunk
from expertmesh.attention_server.drafting import Drafter
from expertmesh.attention_server.events import Abort, EndAll, Event, Unlink
from expertmesh.attention_server.kv_cache import BlockManager, chain_digests
from expertmesh.attention_server.observe import RequestMetrics
from expertmesh.attention_server.outputs import Load, Output, answer, ended
from expertmesh.attention_server.prefix_desk import PrefixDesk
from expertmesh.attention_server.prepared import PreparedBatch
from expertmesh.attention_server.request import RefusedError, Sequence, SequenceState
from expertmesh.attention_server.sampler import Logprobs, Sampled
from expertmesh.attention_server.scheduler import Limits, Scheduler, SchedulerCounts

log = logging.getLogger(__name__)


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
        self._active = ActiveSequences()
        self._prepared = PreparedBatch()
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
            for sequence in self._active:
                if sequence.trace is not None:
                    sequence.trace.link(traceparent, what)

    def link_batch(self, traceparent: str) -> None:
        """The traced sequences of the prepared batch ride in the step whose trace it is. From the step thread."""
        with self._lock:
            self._prepared.link(traceparent)

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
            if self._prepared.is_whole:
                return self._prepared.chunks, False
            self._unprepare()
            chunks, outgrown = self._scheduler.schedule()
            while outgrown:
                for sequence in outgrown:
                    self._end(sequence, grpc.StatusCode.RESOURCE_EXHAUSTED, self._outgrown_message(sequence))
                chunks, outgrown = self._scheduler.schedule()
            self._prepared.set(chunks)
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
            assert chunks is self._prepared.chunks, "a step other than the prepared one was computed"
            prefilled = sum([chunk.count for chunk in chunks if chunk.is_prefill])
            self._prepared.trace_launch()
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

    def _collect(self) -> None:
        while self._inbox:
            event = self._inbox.popleft()
            match event:
                case Sequence():
                    self._accept(event)
                case Abort():
                    sequence = self._active.get(event.link, event.handle)
                    if sequence is not None:
                        self._drop(sequence, "aborted")
                case Unlink():
                    for sequence in [s for s in self._active if s.link == event.link]:
                        self._drop(sequence, "the router's link broke")
                case EndAll():
                    for sequence in self._active:
                        self._end(sequence, event.code, event.message)
        for sequence in self._active.take_overdue(self._clock()):
            message = f"the deadline of {sequence.timeout_s:.3g} s passed after {sequence.num_output} output tokens"
            self._end(sequence, grpc.StatusCode.DEADLINE_EXCEEDED, message)

    def _accept(self, sequence: Sequence) -> None:
        try:
            if self._active.get(sequence.link, sequence.handle) is not None:
                raise RefusedError(grpc.StatusCode.ALREADY_EXISTS, f"handle {sequence.handle} is in use on this link")
            self._scheduler.add(sequence)
        except RefusedError as refusal:
            log.info("request %s refused: %s", sequence.request_id, refusal)
            self._outputs.append(Output(sequence.link, sequence.handle, code=refusal.code, message=str(refusal)))
            self._metrics.ended(sequence, self._clock(), str(refusal))
            return
        self._active.add(sequence)

    def _started(self, sequence: Sequence) -> None:
        self._place(sequence)
        self._metrics.started(sequence, self._clock())

    def _answer(self, sequence: Sequence, token: int, logprobs: Logprobs | None, now: float) -> bool:
        """Whether the token ends the sequence."""
        is_first = not sequence.last_token_s
        self._metrics.token(sequence, now)
        output = answer(sequence, token, logprobs, is_first=is_first)
        self._outputs.append(output)
        if output.ends:
            self._drop(sequence, output.message)
        return output.ends

    def _end(self, sequence: Sequence, code: grpc.StatusCode, message: str) -> None:
        self._outputs.append(ended(sequence, code, message))
        self._drop(sequence, message)

    def _drop(self, sequence: Sequence, error: str) -> None:
        """Forget a sequence. Its blocks stay while a prepared step may write to them."""
        self._active.remove(sequence)
        sequence.num_tokens -= sequence.num_pending
        sequence.num_pending = 0
        self._metrics.ended(sequence, self._clock(), error)
        if sequence.in_batch:
            self._prepared.drop(sequence)
        else:
            self._scheduler.remove(sequence)

    def _unprepare(self) -> None:
        for sequence in self._prepared.clear():
            self._scheduler.remove(sequence)

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
