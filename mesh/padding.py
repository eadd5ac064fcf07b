"""Padded steps: which sizes there are, and which one a step of all ranks gets.

What a padded step computes has the same shapes each time, so that a CUDA graph can hold it. There are two kinds: decode
steps, in which every token is a sequence's only one, and steps with chunks of prompts, whose first tokens are such
sequences and whose other ones belong to chunks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.v1 import mesh_pb2

if TYPE_CHECKING:
    from expertmesh.mesh.config import AttentionConfig

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Tokens a rank of decode steps: what pads one costs less than 15 % from 48 tokens on."""

CHUNK_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens a rank of steps with chunks of prompts. They are few: padding goes through the dense layers alone, and so many
tokens choose nearly all experts, whose weights are read in any case."""


MICRO_BATCHES = 2
"""Of a step that is split."""


@dataclass(frozen=True, slots=True)
class PaddedStep:
    """So many ``micro_batches`` of ``size`` tokens on each rank with an attention half, padding included."""

    size: int
    micro_batches: int = 1
    has_chunks: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What the steps of a view are padded to, the same on all ranks: decode steps, each half of those that are split,
    steps with chunks; by default nothing is. ``eager``: those that between them need every kernel that others may need.
    """

    decode: tuple[int, ...] = ()
    split: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    eager: tuple[int, ...] = ()


def step_sizes(config: AttentionConfig, micro_batches: int) -> StepSizes:
    """Of views on GPUs. Steps that are computed as two micro-batches are padded only if they have no chunks."""
    splits = micro_batches == MICRO_BATCHES
    most_decodes = min(config.max_num_seqs, config.max_num_batched_tokens)
    chunks = () if splits else chunk_sizes(config)
    return StepSizes(
        decode=sizes_up_to(most_decodes),
        split=sizes_up_to(-(-most_decodes // MICRO_BATCHES)) if splits else (),
        chunks=chunks,
        eager=eager_sizes_up_to(max(config.max_num_seqs, config.max_num_batched_tokens), max((0, *chunks))),
    )


def chunk_sizes(config: AttentionConfig) -> tuple[int, ...]:
    """What steps with chunks are padded to."""
    return chunk_sizes_up_to(min(config.prompt_graph_tokens, config.max_num_batched_tokens))


def sizes_up_to(limit: int) -> tuple[int, ...]:
    """The sizes that decode steps of at most ``limit`` tokens need."""
    return tuple(size for size in SIZES if size < limit) + ((round_up(limit),) if limit <= SIZES[-1] else ())


def round_up(num_tokens: int) -> int:
    """The size of a decode step of so many tokens; beyond the largest one the number itself."""
    return _round_up(SIZES, num_tokens)


def chunk_sizes_up_to(limit: int) -> tuple[int, ...]:
    """The sizes that steps with chunks need, as far as they have at most ``limit`` tokens; 0 = none."""
    if not limit:
        return ()
    largest = round_up_chunks(min(limit, CHUNK_SIZES[-1]))
    return tuple(size for size in CHUNK_SIZES if size <= largest)


def round_up_chunks(num_tokens: int) -> int:
    """As ``round_up``, of a step with chunks."""
    return _round_up(CHUNK_SIZES, num_tokens)


def _round_up(sizes: Sequence[int], num_tokens: int) -> int:
    place = bisect_left(sizes, num_tokens)
    return sizes[place] if place < len(sizes) else num_tokens


def eager_sizes_up_to(limit: int, beyond: int = 0) -> tuple[int, ...]:
    """Tokens of steps that are not padded that between them need every kernel that such steps may need.

    ``beyond``: the largest padded step with chunks: those need what smaller steps need.
    """
    return tuple(size for size in (2**n for n in range(5, 20)) if beyond < size <= limit)


def padded_step(readies: Iterable[mesh_pb2.StepReady]) -> PaddedStep | None:
    """The padded step that serves what all ranks bring, and that all have captured; None = it is computed as it is."""
    busy = [message for message in readies if message.num_tokens]
    if not busy:
        return None
    most = max(message.num_tokens for message in busy)
    if all(message.can_pad for message in busy):
        if any(message.first_tokens for message in busy):
            parts = [(first_tokens(message), message.num_tokens) for message in busy]
            return PaddedStep(round_up(max(max(first, total - first) for first, total in parts)), MICRO_BATCHES)
        return PaddedStep(round_up(most))
    if all(message.can_pad_chunks for message in busy):
        return PaddedStep(round_up_chunks(most), has_chunks=True)
    return None


def first_tokens(message: mesh_pb2.StepReady) -> int:
    """In the first micro-batch of a step that has two, which need not pay for every rank."""
    return message.first_tokens or message.num_tokens


def announced(go: mesh_pb2.StepGo) -> PaddedStep | None:
    """The padded step that the leader has chosen, None = the step is computed as it is."""
    if not go.padded_tokens:
        return None
    return PaddedStep(go.padded_tokens, MICRO_BATCHES if go.first_tokens else 1, go.padded_chunks)
