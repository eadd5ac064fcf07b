"""Which padded step serves what the ranks of a view bring."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.padding import (
    CHUNK_SIZES,
    SIZES,
    PaddedStep,
    announced,
    chunk_sizes_up_to,
    eager_sizes_up_to,
    padded_step,
    round_up,
    round_up_chunks,
    sizes_up_to,
    step_sizes,
)
from expertmesh.v1 import mesh_pb2

IDLE: dict[str, Any] = {}


def decodes(num_tokens: int, **more: Any) -> dict[str, Any]:
    return {"num_tokens": num_tokens, "can_pad": True, "can_pad_chunks": True, **more}


def prompts(num_tokens: int) -> dict[str, Any]:
    return {"num_tokens": num_tokens, "can_pad_chunks": True}


def other(num_tokens: int) -> dict[str, Any]:
    return {"num_tokens": num_tokens}


@pytest.mark.parametrize(
    ("brought", "expected"),
    [
        ([IDLE, IDLE], None),
        ([decodes(3), IDLE], PaddedStep(4)),
        ([decodes(3), decodes(17)], PaddedStep(24)),
        ([decodes(9, first_tokens=5), decodes(3)], PaddedStep(8, micro_batches=2)),
        ([IDLE, prompts(40)], PaddedStep(64, has_chunks=True)),
        ([decodes(100), prompts(40)], PaddedStep(128, has_chunks=True)),
        ([prompts(192), prompts(40), IDLE], PaddedStep(192, has_chunks=True)),
        ([prompts(40), other(40)], None),
        ([decodes(2), other(4000)], None),
        ([decodes(2, can_pad_chunks=False), prompts(40)], None),
    ],
    ids=str,
)
def test_all_ranks_must_be_able_to_pad(brought: list[dict[str, Any]], expected: PaddedStep | None) -> None:
    assert padded_step([mesh_pb2.StepReady(**parts) for parts in brought]) == expected


@pytest.mark.parametrize(
    ("go", "expected"),
    [
        ({}, None),
        ({"padded_tokens": 64}, PaddedStep(64)),
        ({"padded_tokens": 64, "padded_chunks": True}, PaddedStep(64, has_chunks=True)),
        ({"padded_tokens": 8, "first_tokens": [5, 3]}, PaddedStep(8, micro_batches=2)),
    ],
    ids=str,
)
def test_a_rank_knows_the_step_from_what_the_leader_says(go: dict[str, Any], expected: PaddedStep | None) -> None:
    assert announced(mesh_pb2.StepGo(**go)) == expected


def test_decode_sizes_serve_every_step_up_to_a_limit() -> None:
    for limit in (1, 3, 8, 9, 256, 300, 512):
        sizes = sizes_up_to(limit)
        assert max(sizes) >= limit
        assert {round_up(tokens) for tokens in range(1, limit + 1)} == set(sizes)
    assert sizes_up_to(4096) == SIZES
    assert round_up(4000) == 4000


def test_sizes_with_chunks_serve_every_step_up_to_a_limit() -> None:
    for limit in (1, 64, 65, 512, 600, CHUNK_SIZES[-1]):
        assert {round_up_chunks(tokens) for tokens in range(1, limit + 1)} == set(chunk_sizes_up_to(limit))
    assert chunk_sizes_up_to(0) == ()
    assert chunk_sizes_up_to(100_000) == CHUNK_SIZES


def test_a_view_has_what_its_steps_can_need() -> None:
    sizes = step_sizes(AttentionConfig(max_num_seqs=20, max_num_batched_tokens=300, prompt_graph_tokens=1024), 1)
    assert sizes.decode == (1, 2, 4, 8, 16, 24)
    assert sizes.chunks == (64, 128, 192, 256, 384), "no step has more than 300 tokens"
    assert sizes.eager == (), "padded steps need all kernels that others may need"
    sizes = step_sizes(AttentionConfig(max_num_batched_tokens=4096, prompt_graph_tokens=100), 1)
    assert sizes.chunks == (64, 128)
    assert sizes.eager == (256, 512, 1024, 2048, 4096)
    sizes = step_sizes(AttentionConfig(max_num_seqs=20, prompt_graph_tokens=0), 1)
    assert sizes.chunks == ()
    assert sizes.eager == eager_sizes_up_to(512) == (32, 64, 128, 256, 512)


def test_steps_that_are_split_are_padded_without_chunks_alone() -> None:
    sizes = step_sizes(AttentionConfig(max_num_seqs=20), 2)
    assert (sizes.split, sizes.chunks) == ((1, 2, 4, 8, 16), ())
    assert sizes.eager[0] == 32
