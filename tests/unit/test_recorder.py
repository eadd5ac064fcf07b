"""Token-level recordings on a rank: bounded, whole, in pieces that fit a message."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.mesh import recorder
from expertmesh.mesh.placement import Ints
from expertmesh.mesh.recorder import TraceRecorder
from expertmesh.v1 import mesh_pb2

NUM_LAYERS, TOP_K = 2, 3


def step(first: int, tokens: int) -> Ints:
    """Every number tells its layer, token and choice apart."""
    return (
        np.arange(NUM_LAYERS)[:, None, None] * 10_000
        + np.arange(first, first + tokens)[:, None] * 10
        + np.arange(TOP_K)
    )


def joined(chunks: list[mesh_pb2.TraceChunk]) -> Ints:
    shape = NUM_LAYERS, -1, TOP_K
    return np.concatenate([np.frombuffer(chunk.topk, "<i2").reshape(shape) for chunk in chunks], axis=1)


def start(made: TraceRecorder, record_id: int, max_tokens: int) -> None:
    made.control(mesh_pb2.RecordControl(id=record_id, max_tokens=max_tokens))


def test_nothing_is_recorded_unasked() -> None:
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    made.record(step(0, 5))
    assert not made.is_active
    assert made.take() == []


def test_tokens_of_several_steps_up_to_the_wanted_number() -> None:
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 12)
    made.record(step(0, 5))
    first = made.take()
    made.record(step(5, 5))
    made.record(step(10, 5))
    made.record(step(15, 5))
    second = made.take()
    assert [(c.first_token, c.num_tokens, c.done) for c in first + second] == [(0, 5, False), (5, 7, True)]
    np.testing.assert_array_equal(joined(first + second), step(0, 12))
    assert not made.is_active


def test_chunks_fit_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 4 * NUM_LAYERS * TOP_K * 2)
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 10)
    made.record(step(0, 10))
    chunks = made.take()
    assert [(c.first_token, c.num_tokens, c.done) for c in chunks] == [(0, 4, False), (4, 4, False), (8, 2, True)]
    np.testing.assert_array_equal(joined(chunks), step(0, 10))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "KEPT_BYTES", 8 * NUM_LAYERS * TOP_K * 2)
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 1000)
    made.record(step(0, 6))
    made.record(step(6, 6))
    made.record(step(12, 1))
    (chunk,) = made.take()
    assert (chunk.num_tokens, chunk.done) == (6, True)


def test_a_stop_drops_what_is_left_and_only_its_own_recording() -> None:
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 10)
    made.record(step(0, 4))
    start(made, 2, 0)
    assert made.is_active
    start(made, 1, 0)
    assert made.take() == []


def test_a_start_that_comes_again_changes_nothing_and_another_one_replaces() -> None:
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 10)
    made.record(step(0, 4))
    start(made, 1, 10)
    made.record(step(4, 2))
    assert [c.num_tokens for c in made.take()] == [6]
    start(made, 2, 3)
    made.record(step(6, 4))
    assert [(c.record_id, c.first_token, c.num_tokens, c.done) for c in made.take()] == [(2, 0, 3, True)]


def test_begin_and_end_are_told() -> None:
    made = TraceRecorder(NUM_LAYERS, TOP_K)
    start(made, 1, 4)
    assert [(c.num_tokens, c.done) for c in made.take()] == [(0, False)]
    assert made.take() == []
    made.record(step(0, 3))
    assert [c.done for c in made.take()] == [False]
    assert made.take() == []
    made.record(step(3, 3))
    assert [(c.num_tokens, c.done) for c in made.take()] == [(1, True)]
