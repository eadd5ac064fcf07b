"""Continuous batching of recorded arrivals over the steps of a mesh, with a step's time from the cost model.

A request goes to the attention rank with the fewest tokens reserved, waits there until its whole prompt and output fit
the KV cache, is prefilled in chunks beside the decoding requests, and then gets a token a step. Steps without prefill
between two events (an arrival, a request's end) are made together: that changes nothing but the time it takes.

Dimensions: A attention ranks, N requests, n steps.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.arrivals import Arrivals
from expertmesh.balancer.simulator.step_time import AttentionWork, MeshTime, StepTime

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
BLOCK_ENTRIES = 1 << 16
"""Steps x ranks that are computed together at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Of one attention rank: requests at a time, tokens a step, tokens in its KV cache."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What became of the requests and of the steps.

    Args:
        first_s, done_s: when the first and the last token came, nan for refused requests; float64 [N].
        step_s: of every step.
        attention_s, experts_s, exchange_s, fixed_s: in all.
    """

    first_s: Floats
    done_s: Floats
    step_s: Floats
    attention_s: float
    experts_s: float
    exchange_s: float
    fixed_s: float


def replay(arrivals: Arrivals, step_time: StepTime, limits: Limits, num_ranks: int, max_block: int = 1 << 16) -> Replay:
    """Serve every request that fits a KV cache.

    Args:
        num_ranks: attention ranks.
        max_block: steps made together at most; 1 makes them one by one.
    """
    mesh = _Mesh(arrivals, step_time, limits, num_ranks, max_block)
    while mesh.turn():
        pass
    return mesh.result()


@dataclass(kw_only=True, slots=True)
class _Parts:
    attention_s: float = 0.0
    experts_s: float = 0.0
    exchange_s: float = 0.0
    fixed_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class _Prefill:
    request: int
    done: int = 0


@dataclass(kw_only=True, slots=True)
class _Chunks:
    """Prompt tokens of a step."""

    tokens_A: Ints
    pairs_A: Ints
    finished: list[tuple[int, int]] = field(default_factory=list)  # rank, request


class _Mesh:
    def __init__(self, arrivals: Arrivals, step_time: StepTime, limits: Limits, num_ranks: int, max_block: int) -> None:
        self._arrivals = arrivals
        self._arrival_s: list[float] = arrivals.arrival_s.tolist()
        self._prompts: list[int] = arrivals.prompt_tokens.tolist()
        self._outputs: list[int] = arrivals.output_tokens.tolist()
        self._step_time = step_time
        self._limits = limits
        self._max_block = max(1, min(max_block, BLOCK_ENTRIES // num_ranks))
        self._num_ranks = num_ranks
        self._now = 0.0
        self._step = 0
        self._next = 0  # request that arrives next
        self._decoding_A, self._context_A = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
        self._promised_A = np.zeros(num_ranks, np.int64)  # tokens of all requests of a rank, waiting or not
        self._reserved = [0] * num_ranks
        self._seqs = [0] * num_ranks
        self._waiting: list[deque[int]] = [deque() for _ in range(num_ranks)]
        self._prefilling: dict[int, deque[_Prefill]] = {}
        self._ending: dict[int, list[tuple[int, int]]] = {}  # step → (rank, request)
        self._end_steps: list[int] = []
        self._first_s, self._done_s = np.full(len(arrivals), np.nan), np.full(len(arrivals), np.nan)
        self._step_s: list[Floats] = []
        self._parts = _Parts()

    def result(self) -> Replay:
        parts = self._parts
        return Replay(
            first_s=self._first_s,
            done_s=self._done_s,
            step_s=np.concatenate(self._step_s) if self._step_s else np.zeros(0),
            attention_s=parts.attention_s,
            experts_s=parts.experts_s,
            exchange_s=parts.exchange_s,
            fixed_s=parts.fixed_s,
        )

    def turn(self) -> bool:
        """One step with prefill, or several without; False when all is done."""
        self._arrive()
        if self._prefilling:
            self._prefill_step()
        elif self._end_steps:
            self._decode_steps()
        elif self._next < len(self._arrivals):
            self._now = max(self._now, self._arrival_s[self._next])
        else:
            return False
        return True

    def _arrive(self) -> None:
        while self._next < len(self._arrivals) and self._arrival_s[self._next] <= self._now:
            request, self._next = self._next, self._next + 1
            size = self._size(request)
            if size <= self._limits.kv_tokens:
                rank = int(self._promised_A.argmin())
                self._promised_A[rank] += size
                self._waiting[rank].append(request)
                self._admit(rank)

    def _size(self, request: int) -> int:
        return self._prompts[request] + self._outputs[request]

    def _admit(self, rank: int) -> None:
        waiting = self._waiting[rank]
        while waiting and self._seqs[rank] < self._limits.max_num_seqs:
            size = self._size(waiting[0])
            if self._reserved[rank] + size > self._limits.kv_tokens:
                return
            self._reserved[rank] += size
            self._seqs[rank] += 1
            self._prefilling.setdefault(rank, deque()).append(_Prefill(request=waiting.popleft()))

    # Steps.

    def _prefill_step(self) -> None:
        chunks = self._take_chunks()
        sampled_A = self._decoding_A.copy()
        for rank, _ in chunks.finished:
            sampled_A[rank] += 1
        tokens_A = self._decoding_A + chunks.tokens_A
        work = AttentionWork(tokens_A=tokens_A, sampled_A=sampled_A, context_A=self._context_A, pairs_A=chunks.pairs_A)
        attention_s = float(self._step_time.attention(work).max())
        mesh = self._step_time.mesh(int(tokens_A.sum()), int(tokens_A.max()))
        self._pass(np.array([attention_s]), mesh)
        for rank, request in chunks.finished:
            self._first_s[request] = self._now
            self._decoding_A[rank] += 1
            self._context_A[rank] += self._prompts[request] + 1
            self._end_at(self._step + self._outputs[request] - 1, rank, request)
        self._end_requests()

    def _take_chunks(self) -> _Chunks:
        """First come, first served: as many prompt tokens of each rank as its step has room for."""
        chunks = _Chunks(tokens_A=np.zeros(self._num_ranks, np.int64), pairs_A=np.zeros(self._num_ranks, np.int64))
        for rank in list(self._prefilling):
            queue = self._prefilling[rank]
            room = self._limits.max_num_batched_tokens - int(self._decoding_A[rank])
            while queue and room > 0:
                head = queue[0]
                taken = min(room, self._prompts[head.request] - head.done)
                chunks.tokens_A[rank] += taken
                chunks.pairs_A[rank] += taken * head.done + taken * (taken + 1) // 2
                head.done += taken
                room -= taken
                if head.done == self._prompts[head.request]:
                    chunks.finished.append((rank, queue.popleft().request))
            if not queue:
                del self._prefilling[rank]
        return chunks

    def _decode_steps(self) -> None:
        count = min(self._end_steps[0] - self._step, self._max_block)
        none_A = np.zeros(self._num_ranks, np.int64)
        work = AttentionWork(
            tokens_A=self._decoding_A, sampled_A=self._decoding_A, context_A=self._context_A, pairs_A=none_A
        )
        growth_A = self._decoding_A * self._step_time.context_token_s
        attention_nA = self._step_time.attention(work) + np.arange(count)[:, None] * growth_A
        mesh = self._step_time.mesh(int(self._decoding_A.sum()), int(self._decoding_A.max()))
        attention_n = attention_nA.max(axis=1)
        if self._next < len(self._arrivals):  # the step in which a request arrives is the last one
            ends_n = self._now + np.cumsum(attention_n + mesh.total_s)
            attention_n = attention_n[: int(np.searchsorted(ends_n, self._arrival_s[self._next])) + 1]
        self._pass(attention_n, mesh)
        self._end_requests()

    def _pass(self, attention_n: Floats, mesh: MeshTime) -> None:
        """So many steps go by; each decoding request has a token more after each of them."""
        count = len(attention_n)
        step_n = attention_n + mesh.total_s
        self._step_s.append(step_n)
        self._now = float(self._now + np.cumsum(step_n)[-1])
        self._step += count
        self._context_A += count * self._decoding_A
        parts = self._parts
        parts.attention_s += float(attention_n.sum())
        parts.experts_s += count * mesh.experts_s
        parts.exchange_s += count * mesh.exchange_s
        parts.fixed_s += count * mesh.fixed_s

    def _end_at(self, step: int, rank: int, request: int) -> None:
        if step not in self._ending:
            self._ending[step] = []
            heapq.heappush(self._end_steps, step)
        self._ending[step].append((rank, request))

    def _end_requests(self) -> None:
        while self._end_steps and self._end_steps[0] <= self._step:
            for rank, request in self._ending.pop(heapq.heappop(self._end_steps)):
                size = self._size(request)
                self._done_s[request] = self._now
                self._decoding_A[rank] -= 1
                self._context_A[rank] -= size
                self._promised_A[rank] -= size
                self._reserved[rank] -= size
                self._seqs[rank] -= 1
                self._admit(rank)
