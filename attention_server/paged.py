"""The paged KV cache and attention over it, for a whole step at once.

Dimensions: T tokens of the step, N cache positions, G sequences of a group, Q padded query tokens of a sequence, L
padded context, H query heads, R of them that share a KV head, K KV heads, D head size.

A step's tokens come sequence by sequence. Runs of sequences that want about as many query tokens and as much context
form a *group*, one call of scaled_dot_product_attention, so that no loop goes over sequences or tokens. The index
tensors and masks of the groups (``StepIndex``) are made once a step and serve all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

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

    A step has ``groups``, or ``tokens`` where the compiled kernels run it.
    """

    position_T: torch.Tensor
    cache_T: torch.Tensor
    groups: tuple[Group, ...]
    tokens: TokenIndex | None = None


def build_step_index(
    starts: np.ndarray,
    counts: np.ndarray,
    blocks_SB: np.ndarray,
    *,
    block_size: int,
    dtype: torch.dtype,
    max_compiled_tokens: int = 0,
) -> StepIndex:
    """Index tensors of a step.

    Args:
        starts, counts: int64 [S]; sequence s computes the tokens at positions starts[s] .. starts[s] + counts[s] - 1.
            Sequences must come with ``counts`` ascending, which keeps a group's tokens together.
        max_compiled_tokens: a step of no more tokens is left to the compiled kernels, unless they would read the same
            context too often: they know no two tokens of one sequence.
        blocks_SB: the sequences' block tables; entries beyond a sequence's end may hold any valid block.
    """
    ends = np.cumsum(counts)
    token_sequence = np.repeat(np.arange(len(counts)), counts)
    position = np.arange(ends[-1]) + (starts - (ends - counts))[token_sequence]
    cache = blocks_SB[token_sequence, position // block_size] * block_size + position % block_size
    if len(position) <= max_compiled_tokens and (counts[-1] == 1 or position.sum() <= _COMPILED_CONTEXT):
        tokens = TokenIndex(position + 1, blocks_SB[token_sequence], block_size)
        return StepIndex(torch.from_numpy(position), torch.from_numpy(cache), (), tokens)
    groups = tuple(
        _build_group(first, last, starts, counts, ends, blocks_SB, block_size, dtype)
        for first, last in _split(starts + counts, counts)
    )
    return StepIndex(torch.from_numpy(position), torch.from_numpy(cache), groups)


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
    ends: np.ndarray,
    blocks_SB: np.ndarray,
    block_size: int,
    dtype: torch.dtype,
) -> Group:
    start_G, count_G = starts[first:last, None], counts[first:last, None]
    num_sequences, num_queries = last - first, int(count_G.max())
    base = int(ends[first] - counts[first])
    tokens = slice(base, int(ends[last - 1]))
    if num_sequences == 1 and starts[first] == 0:
        return Group(tokens, 1, num_queries, None, None, None, None, causal=True)
    length = int((start_G + count_G).max())
    num_blocks = -(-length // block_size)
    context = (blocks_SB[first:last, :num_blocks, None] * block_size + np.arange(block_size)).reshape(last - first, -1)
    query_ = answer_ = mask = None
    column_Q = np.arange(num_queries)
    if tokens.stop - tokens.start != num_sequences * num_queries:
        # Padding repeats a sequence's last query: its answer is right, and dropped.
        offset_G = (ends[first:last, None] - count_G) - base
        query_ = torch.from_numpy((offset_G + np.minimum(column_Q, count_G - 1)).reshape(-1))
        answer_ = torch.from_numpy(np.flatnonzero(column_Q < count_G))
    if num_queries > 1 or (start_G + count_G).min() < length:
        limit_GQ = start_G + np.minimum(column_Q, count_G - 1)
        mask = torch.zeros(num_sequences, 1, num_queries, length, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(np.arange(length) > limit_GQ[:, None, :, None]), float("-inf"))
    context_ = torch.from_numpy(np.ascontiguousarray(context[:, :length]).reshape(-1))
    return Group(tokens, num_sequences, num_queries, query_, answer_, context_, mask, causal=False)


class PagedKvCache:
    """Keys and values of all layers: for each layer one tensor [N, 2K, D], a position's keys before its values."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_blocks * block_size, 2 * num_kv_heads, head_dim)
        # Zeros: masked positions are multiplied by 0 and must be finite. Pages that nobody used take no memory.
        self._layers = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self._num_kv_heads = num_kv_heads

    def layer(self, layer: int) -> torch.Tensor:
        """One layer's keys and values, [N, 2K, D]."""
        return self._layers[layer]

    def attend(self, layer: int, qkv_THD: torch.Tensor, index: StepIndex) -> torch.Tensor:
        """Store the step's keys and values, then answer its queries.

        Args:
            qkv_THD: [T, R·K + 2K, D]: query heads (those of a KV head together), key heads, value heads.

        Returns: [T, R·K·D]. Storing is idempotent: the same step may be run again.
        """
        cache_NKD = self._layers[layer]
        kv_heads = 2 * self._num_kv_heads
        cache_NKD.index_copy_(0, index.cache_T, qkv_THD[:, -kv_heads:])
        answers = [self._attend_group(cache_NKD, qkv_THD[group.tokens], group) for group in index.groups]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _attend_group(self, cache_NKD: torch.Tensor, qkv_THD: torch.Tensor, group: Group) -> torch.Tensor:
        num_kv_heads, head_dim = self._num_kv_heads, qkv_THD.shape[2]
        q_THD = qkv_THD[:, : -2 * num_kv_heads]
        context_ = group.context_
        kv_TKD = qkv_THD[:, -2 * num_kv_heads :] if context_ is None else cache_NKD.index_select(0, context_)
        kv_GKLD = kv_TKD.view(group.num_sequences, -1, 2 * num_kv_heads, head_dim).transpose(1, 2)
        k_GKLD, v_GKLD = kv_GKLD[:, :num_kv_heads], kv_GKLD[:, num_kv_heads:]
        if group.num_queries == 1:
            # The query heads of a KV head stand in for query positions: grouped-query attention without a copy.
            q_GKRD = q_THD.view(group.num_sequences, num_kv_heads, -1, head_dim)
            out_GKRD = F.scaled_dot_product_attention(q_GKRD, k_GKLD, v_GKLD, group.mask)
            return out_GKRD.reshape(group.num_sequences, -1)
        if group.query_ is not None:
            q_THD = q_THD.index_select(0, group.query_)
        q_GHQD = q_THD.view(group.num_sequences, group.num_queries, -1, head_dim).transpose(1, 2)
        out_GHQD = F.scaled_dot_product_attention(
            q_GHQD, k_GKLD, v_GKLD, group.mask, is_causal=group.causal, enable_gqa=True
        )
        out_TC = out_GHQD.transpose(1, 2).reshape(group.num_sequences * group.num_queries, -1)
        return out_TC if group.answer_ is None else out_TC.index_select(0, group.answer_)
