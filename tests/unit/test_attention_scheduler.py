"""Scheduling over injected sizes: no tensors, no clocks."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.attention_server.kv_cache import BlockManager
from expertmesh.attention_server.request import RefusedError, Sampling, Sequence
from expertmesh.attention_server.scheduler import Limits, Scheduler


class Bench:
    """A scheduler whose model answers every completed chunk with token 7."""

    def __init__(self, *, num_blocks: int = 100, caching: bool = True, **limits: int) -> None:
        sizes = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 16, "max_waiting": 100, **limits}
        self.block_size = sizes["block_size"]
        self.blocks = BlockManager(num_blocks, enable_prefix_caching=caching)
        self.placed: list[Sequence] = []
        self.scheduler = Scheduler(
            Limits(**sizes), self.blocks, on_start=self.placed.append, on_stop=self.placed.remove
        )
        self.finished: list[Sequence] = []
        self.outgrown: list[Sequence] = []

    def add(self, prompt: list[int], max_tokens: int = 4, **options: Any) -> Sequence:
        tokens = np.zeros(len(prompt) + max_tokens, np.int64)
        tokens[: len(prompt)] = prompt
        sequence = Sequence(
            link=1,
            handle=0,
            request_id="r",
            tokens=tokens,
            num_prompt=len(prompt),
            num_tokens=len(prompt),
            sampling=Sampling(max_tokens=max_tokens),
            **options,
        )
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, int]]:
        chunks, outgrown = self.scheduler.schedule()
        for sequence in outgrown:
            self.outgrown.append(sequence)
            self.scheduler.remove(sequence)
        completing = [chunk.sequence for chunk in chunks if chunk.completes]
        for chunk in chunks:
            end = chunk.sequence.num_computed + chunk.count
            assert end <= len(chunk.sequence.blocks) * self.block_size
        done = [(chunk.sequence, chunk.count) for chunk in chunks]
        self.scheduler.land(self.scheduler.launch(chunks))
        for sequence in completing:
            sequence.fill(7)
            if sequence.num_tokens == len(sequence.tokens):
                self.finished.append(sequence)
                self.scheduler.remove(sequence)
        return done


def test_prefill_is_chunked_and_decode_goes_on_beside_it() -> None:
    bench = Bench()
    short = bench.add([1, 2, 3])
    long = bench.add(list(range(10, 40)))
    assert bench.step() == [(short, 3), (long, 13)]
    assert bench.step() == [(short, 1), (long, 15)]
    assert bench.step() == [(short, 1), (long, 2)]
    assert bench.step() == [(short, 1), (long, 1)]


def test_smaller_priority_then_earlier_arrival_goes_first() -> None:
    bench = Bench(max_num_seqs=1)
    late = bench.add([1], max_tokens=1, arrival_s=2.0)
    early = bench.add([2], max_tokens=1, arrival_s=1.0)
    urgent = bench.add([3], max_tokens=1, priority=-1, arrival_s=3.0)
    while bench.step():
        pass
    assert bench.finished == [urgent, early, late]


def test_last_sequence_is_preempted_and_finds_its_blocks_again() -> None:
    bench = Bench(num_blocks=4)
    first = bench.add([1] * 7, max_tokens=6, arrival_s=1.0)
    bench.step()
    second = bench.add([2] * 4, max_tokens=4, arrival_s=2.0)
    while bench.step():
        pass
    assert bench.finished == [first, second]
    assert bench.blocks.usage == 0
    assert bench.placed == []


def test_cached_prefix_is_skipped_but_for_the_last_token() -> None:
    bench = Bench()
    bench.add([5] * 8, max_tokens=1)
    bench.step()
    again = bench.add([5] * 8, max_tokens=1)
    assert bench.step() == [(again, 4)]
    assert again.cached_tokens == 4
    assert (bench.scheduler.counts.prefix_queries, bench.scheduler.counts.prefix_hits) == (16, 4)


def test_prompt_that_can_never_fit_is_refused() -> None:
    bench = Bench(num_blocks=2)
    with pytest.raises(RefusedError, match="9 tokens can never fit into the KV cache of 8") as refused:
        bench.add([1] * 9)
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_sequence_that_outgrows_the_cache_is_given_up() -> None:
    bench = Bench(num_blocks=2)
    sequence = bench.add([1] * 7, max_tokens=10)
    while bench.step():
        pass
    assert bench.outgrown == [sequence]
    assert sequence.num_output == 2
    assert bench.blocks.usage == 0


def test_queue_is_bounded() -> None:
    bench = Bench(max_waiting=1)
    bench.add([1])
    with pytest.raises(RefusedError, match=r"attention\.max_waiting") as refused:
        bench.add([2])
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_scheduling_again_without_a_launch_gives_the_same_chunks() -> None:
    bench = Bench()
    for length in (3, 9, 20):
        bench.add(list(range(length)))
    first, _ = bench.scheduler.schedule()
    again, _ = bench.scheduler.schedule()
    assert [(chunk.sequence, chunk.count) for chunk in again] == [(chunk.sequence, chunk.count) for chunk in first]


requests = st.lists(
    st.tuples(st.integers(1, 16), st.integers(1, 9), st.integers(-1, 1), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(requests=requests, num_blocks=st.integers(5, 14), budget=st.integers(1, 20), seqs=st.integers(1, 5))
def test_everything_ends_and_nothing_leaks(
    requests: list[tuple[int, int, int, bool]], num_blocks: int, budget: int, seqs: int
) -> None:
    bench = Bench(num_blocks=num_blocks, max_num_batched_tokens=budget, max_num_seqs=seqs)
    added = []
    aborted = []
    for number, (length, max_tokens, priority, abort) in enumerate(requests):
        sequence = bench.add([number % 3] * length, max_tokens, priority=priority)
        added.append(sequence)
        chunks = bench.step()
        assert sum(count for _, count in chunks) <= budget
        assert len(chunks) <= seqs
        if abort and sequence not in bench.finished:
            aborted.append(sequence)
            bench.scheduler.remove(sequence)
    for _ in range(3000):
        bench.step()  # may compute nothing: it then made room
        if not bench.scheduler.num_running + bench.scheduler.num_waiting:
            break
    assert sorted(map(id, [*bench.finished, *aborted, *bench.outgrown])) == sorted(map(id, added))
    assert bench.blocks.usage == 0
    assert bench.placed == []
    assert (bench.scheduler.num_running, bench.scheduler.num_waiting, bench.scheduler.outstanding_tokens) == (0, 0, 0)


def test_tenants_take_turns_by_tokens_whoever_asks_more_often() -> None:
    bench = Bench(max_num_seqs=1, num_blocks=1000)
    for number in range(20):
        bench.add([1, number], max_tokens=2, tenant="flood")
    bench.step()
    large = bench.add([2] * 6, max_tokens=10, tenant="large")
    small = [bench.add([3, number], max_tokens=2, tenant="small") for number in range(4)]
    for _ in range(400):
        bench.step()
    order = [sequence.tenant for sequence in bench.finished]
    assert len(order) == 25
    # Each costs 4 tokens but the large one, which costs 16: after it the others have four turns each.
    assert bench.finished.index(small[0]) <= 3
    assert bench.finished.index(small[3]) <= 10
    assert bench.finished.index(large) <= 3
    assert order[-12:] == ["flood"] * 12


def test_what_had_its_turn_goes_before_all_tenants() -> None:
    bench = Bench(max_num_seqs=1, num_blocks=1000)
    for number in range(3):
        bench.add([1, number], max_tokens=2, tenant="a")
    bench.step()
    again = Sequence(
        link=1,
        handle=0,
        request_id="r",
        tokens=np.array([2, 2, 7, 0, 0]),
        num_prompt=2,
        num_tokens=3,
        sampling=Sampling(max_tokens=3),
        tenant="a",
    )
    bench.scheduler.add(again)
    urgent = bench.add([4], max_tokens=1, tenant="b", priority=-1)
    for _ in range(50):
        bench.step()
    assert bench.finished.index(urgent) < bench.finished.index(again) <= 2


def test_a_tenant_that_was_idle_saves_nothing_up() -> None:
    bench = Bench(max_num_seqs=1, num_blocks=1000)
    for number in range(10):
        bench.add([1, number], max_tokens=2, tenant="busy")
    for _ in range(20):
        bench.step()
    late = [bench.add([2, number], max_tokens=2, tenant="late") for number in range(10)]
    more = [bench.add([3, number], max_tokens=2, tenant="busy") for number in range(10)]
    for _ in range(200):
        bench.step()
    order = [sequence.tenant for sequence in bench.finished if sequence in late or sequence in more]
    assert len(order) == 20
    assert all(abs(order[:count].count("late") - order[:count].count("busy")) <= 2 for count in range(20))


def test_the_next_step_is_scheduled_while_one_is_under_way() -> None:
    bench = Bench(caching=False)
    short, long = bench.add([1, 2, 3], max_tokens=1), bench.add([4, 5], max_tokens=3)
    first = bench.scheduler.launch(bench.scheduler.schedule()[0])
    chunks, _ = bench.scheduler.schedule()
    assert [(chunk.sequence, chunk.count) for chunk in chunks] == [(long, 1)], "the last token of the other is coming"
    second = bench.scheduler.launch(chunks)
    assert (long.num_tokens, long.num_pending, long.num_computed) == (4, 2, 3)
    bench.scheduler.land(first)
    for sequence, token in ((short, 8), (long, 9)):
        sequence.fill(token)
    bench.scheduler.remove(short)
    assert long.tokens[2] == 9
    assert (long.num_pending, long.num_known_output) == (1, 1)
    bench.scheduler.land(second)
    long.fill(6)
    assert long.tokens[:4].tolist() == [4, 5, 9, 6]


def test_steps_that_are_taken_back_leave_no_trace() -> None:
    bench = Bench(max_num_batched_tokens=4)
    sequences = [bench.add([1, 2, 3, 4, 5, 6]), bench.add([9])]
    bench.step()
    bench.step()
    states = [(s.num_tokens, s.num_pending, s.num_computed) for s in sequences]
    flights = [bench.scheduler.launch(bench.scheduler.schedule()[0]) for _ in range(2)]
    assert [(s.num_tokens, s.num_pending, s.num_computed) for s in sequences] != states
    for flight in reversed(flights):
        bench.scheduler.take_back(flight)
    assert [(s.num_tokens, s.num_pending, s.num_computed) for s in sequences] == states
    while bench.step():
        pass
    assert bench.finished == [sequences[1], sequences[0]] or bench.finished == sequences


def test_nothing_is_scheduled_ahead_that_would_cost_somebody_its_blocks() -> None:
    bench = Bench(num_blocks=3, caching=False)
    sequences = [bench.add([1, 2, 3, 4], max_tokens=8), bench.add([5, 6, 7], max_tokens=8)]
    bench.scheduler.launch(bench.scheduler.schedule()[0])
    assert [len(sequence.blocks) for sequence in sequences] == [1, 1]
    assert bench.scheduler.has_room_to_go_on(), "one block is free, and one sequence needs another"
    bench.scheduler.launch(bench.scheduler.schedule()[0])
    assert not bench.scheduler.has_room_to_go_on(), "the other one needs another now"
