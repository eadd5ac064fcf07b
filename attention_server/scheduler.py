"""Continuous batching with chunked prefill: which sequences compute how many tokens in the next step.

Pure Python without clocks or tensors. Waiting sequences come up as ``WaitingQueue`` says; those that run are served by
smaller priority, then by earlier arrival, and before waiting ones. When blocks run out the last running sequence gives
up its blocks and is computed again later (preemption by recompute).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from expertmesh.attention_server.chunk import Chunk, LaunchedChunk
from expertmesh.attention_server.drafting import Drafter
from expertmesh.attention_server.kv_cache import BlockManager, chain_digests
from expertmesh.attention_server.request import Order, RefusedError, Sequence, SequenceState
from expertmesh.attention_server.waiting import WaitingQueue


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one server. Counts are tokens and sequences of one step; ``max_waiting`` bounds the queue."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int


@dataclass
class SchedulerCounts:
    """Totals since the start: preemptions, and tokens looked up and found in the prefix cache."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class Scheduler:
    """Sequences from ``add`` to ``remove``.

    Args:
        on_start, on_stop: called when a sequence starts to run (before its first chunk) and when it stops (it ended or
            was preempted).
        drafter: drafts for sequences whose next token a step samples, where the step has room for more.
    """

    def __init__(
        self,
        limits: Limits,
        blocks: BlockManager,
        *,
        on_start: Callable[[Sequence], None],
        on_stop: Callable[[Sequence], None],
        drafter: Drafter | None = None,
    ) -> None:
        self._limits = limits
        self._blocks = blocks
        self._on_start = on_start
        self._on_stop = on_stop
        self._drafter = drafter
        self._running: list[Sequence] = []
        self._waiting = WaitingQueue()
        self._num_waiting = 0
        self._waiting_tokens = 0
        self._next_serial = 0
        self.counts = SchedulerCounts()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that all sequences may still prefill or generate."""
        return self._waiting_tokens + sum([sequence.outstanding_tokens for sequence in self._running])

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            RefusedError: RESOURCE_EXHAUSTED when the queue is full or its tokens can never fit into the KV cache.
        """
        capacity = self._blocks.num_blocks * self._limits.block_size
        if sequence.num_tokens > capacity:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{sequence.num_tokens} tokens can never fit into the KV cache of {capacity}: send a shorter prompt, "
                "or raise attention.num_kv_blocks or attention.kv_cache_bytes",
            )
        if self._num_waiting >= self._limits.max_waiting:
            raise RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._num_waiting} requests wait on this attention server (attention.max_waiting): retry later",
            )
        sequence.serial = self._next_serial
        self._next_serial += 1
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence and free its blocks; nothing happens when it has ended already."""
        if sequence.state is SequenceState.RUNNING:
            self._stop(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._num_waiting -= 1
            self._waiting_tokens -= sequence.outstanding_tokens
        sequence.state = SequenceState.ENDED

    def schedule(self) -> tuple[list[Chunk], list[Sequence]]:
        """Choose the next step's chunks and give them blocks.

        Nothing advances before ``launch``: called again instead, it chooses again.

        Returns: the chunks, and sequences that outgrew the whole KV cache: the caller must remove them.
        """
        budget = self._limits.max_num_batched_tokens
        chunks: list[Chunk] = []
        outgrown: list[Sequence] = []
        preemptions = self.counts.preemptions
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            if sequence.num_pending and sequence.is_full:  # its last token is on its way
                index += 1
                continue
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if not self._make_room(sequence, sequence.num_computed + count):
                if sequence.state is SequenceState.RUNNING:
                    outgrown.append(sequence)
                break
            chunks.append(Chunk(sequence, count))
            budget -= count
            index += 1
        if self.counts.preemptions == preemptions and not outgrown:
            budget = self._admit(chunks, budget)
            if self._drafter is not None:
                chunks = self._with_drafts(chunks, budget, self._drafter)
        return chunks, outgrown

    def has_room_to_go_on(self) -> bool:
        """Whether all that run can have another token without a preemption."""
        missing = sum(
            [
                self._num_blocks(sequence.num_tokens) > len(sequence.blocks)
                for sequence in self._running
                if not sequence.is_full
            ]
        )
        return missing <= self._blocks.num_free

    def launch(self, chunks: list[Chunk]) -> list[LaunchedChunk]:
        """The chunks' step is under way: ``schedule`` goes on from what will be there after it."""
        launched = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.num_computed
            end = sequence.num_computed = start + chunk.count
            completes = end == sequence.num_tokens
            launched.append(LaunchedChunk(sequence, start, end, completes, len(chunk.draft)))
            if completes:
                sequence.num_tokens += 1
                sequence.num_pending += 1
        return launched

    def land(self, launched: list[LaunchedChunk]) -> None:
        """The chunks are computed; their full blocks may serve as prefixes from now on."""
        block_size = self._limits.block_size
        for sequence, _, end, *_ in launched:
            if end // block_size > sequence.num_published and sequence.state is SequenceState.RUNNING:
                self._publish(sequence, end)

    def take_back(self, launched: list[LaunchedChunk]) -> None:
        """The chunks' step never happened; steps are taken back from the last one on."""
        for chunk in launched:
            sequence = chunk.sequence
            if sequence.state is SequenceState.RUNNING:
                sequence.num_tokens -= chunk.completes
                sequence.num_pending -= chunk.completes
                sequence.num_computed = chunk.start

    def _admit(self, chunks: list[Chunk], budget: int) -> int:
        """Start sequences that wait; returns the tokens that are left."""
        while budget > 0 and len(self._running) < self._limits.max_num_seqs:
            sequence = self._waiting.head()
            if sequence is None:
                break
            prefix = self._find_prefix(sequence)
            fresh = self._num_blocks(sequence.num_tokens) - len(prefix)
            # One spare block for each running sequence, or the newcomer would be preempted again before long.
            if fresh + len(self._running) > self._blocks.num_available(prefix):
                break
            self._waiting.pop()
            self._start(sequence, prefix, fresh)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            chunks.append(Chunk(sequence, count))
            budget -= count
        return budget

    def _with_drafts(self, chunks: list[Chunk], budget: int, drafter: Drafter) -> list[Chunk]:
        """The chunks with drafts, as far as the step and free blocks have room: no known token waits for one."""
        drafted = []
        for chunk in chunks:
            limit = min(budget, self._draft_room(chunk))
            if limit > 0:
                draft = drafter.draft(chunk.sequence, limit)
                self._make_room(chunk.sequence, chunk.sequence.num_tokens + len(draft))
                chunk = Chunk(chunk.sequence, chunk.count, draft)
                budget -= len(draft)
            drafted.append(chunk)
        return drafted

    def _draft_room(self, chunk: Chunk) -> int:
        """How many tokens could be drafted: one more than those comes of a step, and nobody loses blocks for them."""
        sequence = chunk.sequence
        if not chunk.completes or not sequence.sampling.speculates:
            return 0
        # A spare block for each running sequence is left, as where newcomers are admitted.
        blocks = len(sequence.blocks) + max(0, self._blocks.num_free - len(self._running))
        return min(len(sequence.tokens) - 1, blocks * self._limits.block_size) - sequence.num_tokens

    def _start(self, sequence: Sequence, prefix: list[int], fresh: int) -> None:
        self._num_waiting -= 1
        self._waiting_tokens -= sequence.outstanding_tokens
        self._blocks.refer(prefix)
        sequence.blocks = [*prefix, *self._blocks.allocate(fresh)]
        sequence.num_computed = len(prefix) * self._limits.block_size
        sequence.num_published = len(prefix)
        self.counts.prefix_queries += sequence.num_tokens
        self.counts.prefix_hits += sequence.num_computed
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
        sequence.state = SequenceState.RUNNING
        insort(self._running, sequence, key=_order)
        self._on_start(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for so many tokens, at the cost of those after it; False = it lost itself."""
        missing = self._num_blocks(num_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        while self._blocks.num_free < missing:
            victim = self._running[-1]
            if victim is sequence and len(self._running) == 1:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.blocks += self._blocks.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.counts.preemptions += 1
        self._stop(sequence)
        self._wait(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0
        sequence.num_published = 0
        self._on_stop(sequence)

    def _wait(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._waiting.push(sequence)
        self._num_waiting += 1
        self._waiting_tokens += sequence.outstanding_tokens

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        # At least the last token is computed: its logits are what the sequence came for.
        if not self._blocks.caches_prefixes:
            return []
        num_tokens = sequence.num_tokens - 1
        chain_digests(sequence.tokens, self._limits.block_size, sequence.digests, num_tokens)
        return self._blocks.find_prefix(sequence.digests[: num_tokens // self._limits.block_size])

    def _publish(self, sequence: Sequence, num_computed: int) -> None:
        if not self._blocks.caches_prefixes:
            return
        chain_digests(sequence.tokens, self._limits.block_size, sequence.digests, num_computed)
        for index in range(sequence.num_published, num_computed // self._limits.block_size):
            self._blocks.publish(sequence.blocks[index], sequence.digests[index])
        sequence.num_published = num_computed // self._limits.block_size

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)


def _order(sequence: Sequence) -> Order:
    return sequence.order
