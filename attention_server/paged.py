"""The paged KV cache and attention over it, for a whole step at once.

Dimensions: T tokens of the step, N cache positions, G sequences of a group, Q padded query tokens of a sequence, L
padded context, H query heads, R of them that share a KV head, K KV heads, D head size.

A step's tokens come sequence by sequence. Runs of sequences that want about as many query tokens and as much context
form a *group*, one call of scaled_dot_product_attention, so that no loop goes over sequences or tokens. The index
tensors and masks of the groups (``StepIndex``) are made once a step and serve all layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

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


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A layer's variant: ``scale`` of the scores, None = 1/√D; ``span``: what a token sees, None = all before it.

    ``sink_H``: a logit a head that takes part in the softmax without a value; None = none.
    """

    scale: float | None = None
    span: Span | None = None
    sink_H: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        return self.scale is None and self.span is None and self.sink_H is None


PLAIN = Rule()


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


class PagedKvCache:
    """Keys and values of all layers: for each layer one tensor [N, 2K, D], a position's keys before its values.

    ``shared``: [N, K, D], each row is key and value at once, as in latent attention.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        shared: bool = False,
    ) -> None:
        self._num_kv_heads = num_kv_heads
        self._num_rows = num_kv_heads if shared else 2 * num_kv_heads
        shape = (num_blocks * block_size, self._num_rows, head_dim)
        # Zeros: masked positions are multiplied by 0 and must be finite. Pages that nobody used take no memory.
        self._layers = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]

    @property
    def layers(self) -> Sequence[torch.Tensor]:
        """As ``layer``, of all of them."""
        return self._layers

    def layer(self, layer: int) -> torch.Tensor:
        """One layer's keys and values, [N, 2K, D]."""
        return self._layers[layer]

    def attend(self, layer: int, qkv_THD: torch.Tensor, index: StepIndex, rule: Rule = PLAIN) -> torch.Tensor:
        """Store the step's keys and values, then answer its queries.

        Args:
            qkv_THD: [T, R·K + 2K, D]: query heads (those of a KV head together), key heads, value heads; where keys
                are values, [T, R·K + K, D].

        Returns: [T, R·K·D]. Storing is idempotent: the same step may be run again.
        """
        cache_NKD = self._layers[layer]
        cache_NKD.index_copy_(0, index.cache_T, qkv_THD[:, -self._num_rows :])
        groups = index.groups_of(rule.span)
        answers = [self._attend_group(cache_NKD, qkv_THD[group.tokens], group, rule) for group in groups]
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _attend_group(self, cache_NKD: torch.Tensor, qkv_THD: torch.Tensor, group: Group, rule: Rule) -> torch.Tensor:
        num_kv_heads, head_dim = self._num_kv_heads, qkv_THD.shape[2]
        q_THD = qkv_THD[:, : -self._num_rows]
        context_ = group.context_
        kv_TKD = qkv_THD[:, -self._num_rows :] if context_ is None else cache_NKD.index_select(0, context_)
        kv_GKLD = kv_TKD.view(group.num_sequences, -1, self._num_rows, head_dim).transpose(1, 2)
        k_GKLD, v_GKLD = kv_GKLD[:, :num_kv_heads], kv_GKLD[:, -num_kv_heads:]
        if group.num_queries == 1:
            # The query heads of a KV head stand in for query positions: grouped-query attention without a copy.
            q_GKRD = q_THD.view(group.num_sequences, num_kv_heads, -1, head_dim)
            if rule.sink_H is None:
                out_GKRD = F.scaled_dot_product_attention(q_GKRD, k_GKLD, v_GKLD, group.mask, scale=rule.scale)
            else:
                out_GKRD = attend_with_sinks(q_GKRD, k_GKLD, v_GKLD, rule.sink_H, group.mask, rule.scale)
            return out_GKRD.reshape(group.num_sequences, -1)
        if group.query_ is not None:
            q_THD = q_THD.index_select(0, group.query_)
        q_GHQD = q_THD.view(group.num_sequences, group.num_queries, -1, head_dim).transpose(1, 2)
        out_GHQD = self._attend_rows(q_GHQD, k_GKLD, v_GKLD, group, rule)
        out_TC = out_GHQD.transpose(1, 2).reshape(group.num_sequences * group.num_queries, -1)
        return out_TC if group.answer_ is None else out_TC.index_select(0, group.answer_)

    def _attend_rows(
        self, q_GHQD: torch.Tensor, k_GKLD: torch.Tensor, v_GKLD: torch.Tensor, group: Group, rule: Rule
    ) -> torch.Tensor:
        if rule.sink_H is not None:
            mask = _causal_mask(q_GHQD) if group.causal else group.mask
            return attend_with_sinks(q_GHQD, k_GKLD, v_GKLD, rule.sink_H, mask, rule.scale)
        if self._num_kv_heads == 1:
            # One KV head for all: a view in place of the copies that enable_gqa makes.
            k_GKLD, v_GKLD = (rows.expand(-1, q_GHQD.shape[1], -1, -1) for rows in (k_GKLD, v_GKLD))
        return F.scaled_dot_product_attention(
            q_GHQD, k_GKLD, v_GKLD, group.mask, is_causal=group.causal, scale=rule.scale, enable_gqa=True
        )


def attend_with_sinks(
    q_GCQD: torch.Tensor,
    k_GKLD: torch.Tensor,
    v_GKLD: torch.Tensor,
    sink_H: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Attention whose softmax has one logit more in each head, with nothing behind it (gpt-oss).

    Query heads of a KV head may stand as its query positions, as one query a sequence has them.

    Args:
        mask: added to the scores, broadcast over heads; None = every query sees everything.

    Returns: as the queries.
    """
    num_groups, num_kv_heads, length, dim = k_GKLD.shape
    num_heads = len(sink_H)
    q_GKXD = q_GCQD.reshape(num_groups, num_kv_heads, -1, dim)
    score = (q_GKXD @ k_GKLD.transpose(2, 3)).float() * (dim**-0.5 if scale is None else scale)
    score_GHQL = score.view(num_groups, num_heads, -1, length)
    if mask is not None:
        score_GHQL = score_GHQL + mask
    sink_GHQ1 = sink_H.float()[:, None, None].expand(*score_GHQL.shape[:3], 1)
    weight_GHQL = torch.cat([score_GHQL, sink_GHQ1], dim=-1).softmax(-1)[..., :-1].to(v_GKLD.dtype)
    return (weight_GHQL.reshape(num_groups, num_kv_heads, -1, length) @ v_GKLD).view_as(q_GCQD)


def _causal_mask(q_GHQD: torch.Tensor) -> torch.Tensor:
    length = q_GHQD.shape[2]
    return torch.full((length, length), float("-inf"), dtype=q_GHQD.dtype).triu_(1)
