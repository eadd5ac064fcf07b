"""Where a padded step with chunks lies in the memory of its inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from expertmesh.attention_server.gpu_step import StepMemory
from expertmesh.attention_server.host_step import HostStep
from expertmesh.attention_server.step_places import MOST_CHUNKS, padded_places, places_of
from expertmesh.kernels.paged_prefill import prefill_pieces
from expertmesh.mesh.padding import PaddedStep

SPARE, QUERIES, BLOCK = 9, 4, 2
STEP = PaddedStep(16, has_chunks=True)


def step_of(counts: list[int], starts: list[int], *, sampled: int) -> HostStep:
    """Sequences with ``counts`` new tokens behind ``starts``; of the last ones, as many as ``sampled`` says, a token is
    sampled."""
    count_S, start_S, num_seqs = np.array(counts), np.array(starts), len(counts)
    num_decodes, num_tokens = counts.count(1), sum(counts)
    pieces_C4 = prefill_pieces(count_S[num_decodes:], start_S[num_decodes:], QUERIES)
    pieces_C4[:, :2] += num_decodes
    last_S = np.cumsum(count_S) - 1
    return HostStep(
        chunks=[],
        token_T=np.arange(100, 100 + num_tokens),
        row_T=np.repeat(np.arange(num_seqs), count_S),
        position_T=np.arange(num_tokens) - np.repeat(last_S + 1 - count_S - start_S, count_S),
        place_T=np.arange(20, 20 + num_tokens),
        length_S=start_S + count_S,
        table_SW=np.arange(num_seqs * 3).reshape(num_seqs, 3),
        num_decodes=num_decodes,
        pieces_C4=pieces_C4,
        sampled_Z=last_S[num_seqs - sampled :],
        row_Z=np.arange(num_seqs)[num_seqs - sampled :],
        output_Z=np.full(sampled, 5),
        traceparent="",
    )


def memory() -> StepMemory:
    return StepMemory(
        max_tokens=16,
        max_seqs=8,
        spare_row=SPARE,
        table_width=3,
        queries_a_piece=QUERIES,
        device=torch.device("cpu"),
    )


def upload(where: StepMemory, step: HostStep | None, padded: PaddedStep | None) -> dict[str, Any]:
    places = where.places(padded) if padded is not None else places_of(step) if step is not None else None
    assert places is not None
    number = len(step.row_Z) if step is not None else 0
    context, samples = where.upload(step, np.full(number, 0.5, np.float32), np.arange(7, 7 + number), places)
    return {name: getattr(part, name) for part in (context, samples) for name in type(part).__slots__}


def test_a_padded_step_has_its_tokens_without_gaps_and_all_else_padded() -> None:
    found = upload(memory(), step_of([1, 1, 5, 2], [3, 1, 0, 4], sampled=3), STEP)
    assert found["num_tokens"].tolist() == [9]
    assert found["token_T"].tolist() == [*range(100, 109), *[0] * 7]
    assert found["row_T"].tolist() == [0, 1, 2, 2, 2, 2, 2, 3, 3, *[SPARE] * 7]
    assert found["position_T"].tolist() == [3, 1, 0, 1, 2, 3, 4, 4, 5, *[0] * 7]
    assert found["place_T"].tolist() == [*range(20, 29), *[-1] * 7], "padding writes nothing into the cache"
    assert found["num_decodes"] == 8
    assert found["length_S"].tolist() == [4, 2, *[0] * 6], "a chunk's tokens have no context of their own there"
    assert found["table_SW"][:4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    pieces = found["pieces_C4"].tolist()
    assert sorted(pieces[:3]) == [[2, 2, 0, 4], [2, 6, 4, 1], [3, 7, 4, 2]]
    assert pieces[3:] == [[0] * 4] * 9
    assert found["sampled_Z"].tolist() == [1, 6, 8, *[0] * 5]
    assert found["row_Z"].tolist() == [1, 2, 3, *[SPARE] * 5], "what padding samples is nobody's last token"
    assert found["output_Z"].tolist() == [5, 5, 5, *[0] * 5]
    assert found["temperature_Z"].tolist() == [0.5] * 3 + [0.0] * 5
    assert found["seed_Z"].tolist() == [7, 8, 9, *[0] * 5]


def test_a_padded_step_is_always_at_the_same_addresses() -> None:
    where, steps = memory(), [None, step_of([1, 1, 5], [3, 1, 0], sampled=2), step_of([16], [0], sampled=0), None]
    found = [upload(where, step, STEP) for step in steps]
    assert upload(where, None, PaddedStep(8))["sampled_Z"] is None, "all tokens of a decode step are sampled from"
    for name, first in found[0].items():
        for parts in found[1:]:
            if isinstance(first, torch.Tensor):
                assert (parts[name].data_ptr(), parts[name].shape) == (first.data_ptr(), first.shape), name
            else:
                assert parts[name] == first, name
    assert found[-1]["num_tokens"].item() == 0
    assert not found[-1]["pieces_C4"].any()
    assert not found[-1]["length_S"].any()


def test_a_step_that_is_not_padded_has_what_it_has() -> None:
    found = upload(memory(), step_of([1, 1, 5], [3, 1, 0], sampled=2), None)
    sizes = {name: len(part) for name, part in found.items() if isinstance(part, torch.Tensor)}
    assert (sizes["token_T"], sizes["length_S"], sizes["sampled_Z"], sizes["pieces_C4"]) == (7, 2, 2, 2)


def test_there_are_places_for_every_batch_but_one_of_very_many_short_chunks() -> None:
    places = padded_places(PaddedStep(512, has_chunks=True), max_seqs=512, queries_a_piece=QUERIES)
    most_pieces = 512 // QUERIES + MOST_CHUNKS
    assert places.pieces == most_pieces
    assert places.hold(step_of([512], [0], sampled=1))
    assert places.hold(step_of([1] * 512, [0] * 512, sampled=512))
    assert places.hold(step_of([1] * 200 + [2] * 100, [0] * 300, sampled=300))
    assert places.hold(step_of([2] * most_pieces, [0] * most_pieces, sampled=0))
    assert not places.hold(step_of([2] * (most_pieces + 1), [0] * (most_pieces + 1), sampled=0))
    assert not places.hold(step_of([513], [0], sampled=1))
    few = padded_places(PaddedStep(64, has_chunks=True), max_seqs=3, queries_a_piece=QUERIES)
    assert (few.decodes, few.samples, few.pieces) == (3, 3, 64 // QUERIES + 3)
