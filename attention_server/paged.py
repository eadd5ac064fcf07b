"""The paged KV cache and attention over it, for a whole step at once (``step_index``).

Dimensions: T tokens of the step, N cache positions, G sequences of a group, Q padded query tokens of a sequence, L
padded context, H query heads, R of them that share a KV head, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from expertmesh.attention_server.step_index import Group, StepIndex
from expertmesh.mesh.model.architecture import Span


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
