"""Where the tokens of a step stand in their sequences and in the paged KV cache, and which of them attend together.

Dimensions: T tokens of the step, S sequences, B blocks of a table, G sequences of a group, Q padded query tokens of a
sequence, L padded context.

A step's tokens come sequence by sequence. Runs of sequences that want about as many query tokens and as much context
form a *group*, one call of scaled_dot_product_attention, so that no loop goes over sequences or tokens. The index
tensors and masks of the groups are made once a step and serve all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from expertmesh.mesh.model.architecture import Span

# A decode group is split where the padding would read more than so many cache positions in vain: about what one more
# call costs.
_PADDING_LIMIT = 1024

# Cache positions that the compiled kernels may read in a step with chunks of prompts: about 2 ms a layer.
_COMPILED_CONTEXT = 8192


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that one attention call serves; ``None`` in place of a tensor = that operation is not needed.

    ``tokens`` is the group's slice of the step. ``query_`` picks G·Q padded queries of that slice, ``answer_`` the T
    answers out of the G·Q. ``context_`` [G·L] are cache positions. ``mask`` [G, 1, 1 or Q, L] is added to the scores.
    ``causal``: one sequence from position 0, which attends to the step's own keys and needs no cache.
    """

    tokens: slice
    num_sequences: int
    num_queries: int
    query_: torch.Tensor | None
    answer_: torch.Tensor | None
    context_: torch.Tensor | None
    mask: torch.Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class TokenIndex:
    """Instead of groups, for the compiled kernels: each token's context with itself, and its sequence's block table."""

    length_T: np.ndarray
    blocks_TB: np.ndarray
    block_size: int


@dataclass(frozen=True, slots=True)
class StepIndex:
    """Where the tokens of a step stand: ``position_T`` in their sequences, ``cache_T`` in the cache; int64.

    A step has ``groups``, or ``tokens`` where the compiled kernels run it. ``span_groups`` are those of layers whose
    tokens do not see everything before them.
    """

    position_T: torch.Tensor
    cache_T: torch.Tensor
    groups: tuple[Group, ...]
    tokens: TokenIndex | None = None
    span_groups: Mapping[Span, tuple[Group, ...]] = field(default_factory=dict)

    def groups_of(self, span: Span | None) -> tuple[Group, ...]:
        return self.groups if span is None else self.span_groups[span]


def build_step_index(
    starts: np.ndarray,
    counts: np.ndarray,
    blocks_SB: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    max_compiled_tokens: int = 0,
    spans: Collection[Span] = (),
) -> StepIndex:
    """Index tensors of a step.

    Args:
        starts, counts: int64 [S]; sequence s computes the tokens at positions starts[s] .. starts[s] + counts[s] - 1.
            Sequences must come with ``counts`` ascending, which keeps a group's tokens together.
        max_compiled_tokens: a step of no more tokens is left to the compiled kernels, unless they would read the same
            context too often: they know no two tokens of one sequence.
        blocks_SB: the sequences' block tables; entries beyond a sequence's end may hold any valid block.
        spans: those of the model's layers.
    """
    ends = np.cumsum(counts)
    token_sequence = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(ends[-1]) + (starts - (ends - counts))[token_sequence]
    cache = blocks_SB[token_sequence, position // block_size] * block_size + position % block_size
    if len(position) <= max_compiled_tokens and (counts[-1] == 1 or position.sum() <= _COMPILED_CONTEXT):
        tokens = TokenIndex(position + 1, blocks_SB[token_sequence], block_size)
        return StepIndex(torch.from_numpy(position), torch.from_numpy(cache), (), tokens)
    build = partial(_build_groups, starts, counts, blocks_SB, block_size, dtype)
    return StepIndex(
        torch.from_numpy(position),
        torch.from_numpy(cache),
        build(None),
        span_groups={span: build(span) for span in spans},
    )


def _build_groups(
    starts: np.ndarray,
    counts: np.ndarray,
    blocks_SB: np.ndarray,
    block_size: int,
    dtype: torch.dtype,
    span: Span | None,
) -> tuple[Group, ...]:
    ends = np.cumsum(counts)
    lows = _first_seen(starts, span)
    return tuple(
        _build_group(first, last, starts, counts, lows, ends, blocks_SB, block_size, dtype, span)
        for first, last in _split(starts + counts - lows, counts)
    )


def _first_seen(position: np.ndarray, span: Span | None) -> np.ndarray:
    """The first position that a token at ``position`` sees."""
    if span is None:
        return np.zeros_like(position)
    seen: np.ndarray = position // span.size * span.size
    return np.maximum(position - (span.size - 1), 0) if span.kind == "window" else seen


def _split(contexts: np.ndarray, counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of sequences [first, last) with padded query lengths that are equal powers of two and similar contexts."""
    buckets = np.ceil(np.log2(counts)).astype(np.int64)
    edges = np.flatnonzero(np.diff(buckets)) + 1
    for start, stop in zip((0, *edges.tolist()), (*edges.tolist(), len(counts)), strict=True):
        first, longest, total = start, 0, 0
        for index, context in enumerate(contexts[start:stop].tolist(), start):
            longest, total = max(longest, context), total + context
            if longest * (index + 1 - first) - total > _PADDING_LIMIT:
                yield first, index
                first, longest, total = index, context, context
        yield first, stop


def _build_group(
    first: int,
    last: int,
    starts: np.ndarray,
    counts: np.ndarray,
    lows: np.ndarray,
    ends: np.ndarray,
    blocks_SB: np.ndarray,
    block_size: int,
    dtype: torch.dtype,
    span: Span | None,
) -> Group:
    """The sequences first .. last - 1; the context of sequence s begins at position lows[s]."""
    start_G, count_G, low_G = starts[first:last, None], counts[first:last, None], lows[first:last, None]
    num_sequences, num_queries = last - first, int(count_G.max())
    base = int(ends[first] - counts[first])
    tokens = slice(base, int(ends[last - 1]))
    if num_sequences == 1 and starts[first] == 0 and (span is None or num_queries <= span.size):
        return Group(tokens, 1, num_queries, None, None, None, None, causal=True)
    length = int((start_G + count_G - low_G).max())
    query_ = answer_ = mask = None
    column_Q = np.arange(num_queries)
    if tokens.stop - tokens.start != num_sequences * num_queries:
        # Padding repeats a sequence's last query: its answer is right, and dropped.
        offset_G = (ends[first:last, None] - count_G) - base
        query_ = torch.from_numpy((offset_G + np.minimum(column_Q, count_G - 1)).reshape(-1))
        answer_ = torch.from_numpy(np.flatnonzero(column_Q < count_G))
    if num_queries > 1 or (start_G + count_G - low_G).min() < length:
        limit_GQ1 = (start_G + np.minimum(column_Q, count_G - 1))[..., None]
        position_G1L = low_G[..., None] + np.arange(length)
        hidden = position_G1L > limit_GQ1
        if span is not None:
            hidden |= position_G1L < _first_seen(limit_GQ1, span)
        mask = torch.zeros(num_sequences, 1, num_queries, length, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(hidden).unsqueeze(1), float("-inf"))
    context = _places(low_G, length, blocks_SB[first:last], block_size)
    return Group(tokens, num_sequences, num_queries, query_, answer_, torch.from_numpy(context), mask, causal=False)


def _places(low_G1: np.ndarray, length: int, blocks_GB: np.ndarray, block_size: int) -> np.ndarray:
    """Cache positions [G·L] of ``length`` positions from ``low_G1`` on; beyond a sequence's end, any valid ones."""
    if not low_G1.any():
        num_blocks = -(-length // block_size)
        place = blocks_GB[:, :num_blocks, None] * block_size + np.arange(block_size)
        return np.ascontiguousarray(place.reshape(len(blocks_GB), -1)[:, :length]).reshape(-1)
    position_GL = np.minimum(low_G1 + np.arange(length), blocks_GB.shape[1] * block_size - 1)
    block_GL = np.take_along_axis(blocks_GB, position_GL // block_size, axis=1)
    place_GL: np.ndarray = block_GL * block_size + position_GL % block_size
    return place_GL.reshape(-1)
