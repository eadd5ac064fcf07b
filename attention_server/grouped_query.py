"""Grouped-query attention (arXiv:2305.13245) with everything that families add to it.

Dimensions: T tokens, H hidden size, C query and key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expertmesh.attention_server.context import StepContext
from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.norm import RmsNorm, normalise
from expertmesh.attention_server.paged import PagedKvCache, Rule
from expertmesh.attention_server.rope import pair_features, rotate
from expertmesh.mesh.model.architecture import Architecture

Parts = Mapping[str, torch.Tensor]


class GroupedQueryAttention:
    """One layer's attention, from the normed residual stream to what is added to it."""

    def __init__(self, arch: Architecture, layer: int, parts: Parts, kv_cache: PagedKvCache) -> None:
        variant = arch.attention
        self._arch, self._layer, self._kv_cache = arch, layer, kv_cache
        self.qkv = Linear(join_qkv(parts, "proj", arch), join_qkv(parts, "bias", arch) if "q_bias" in parts else None)
        self.o = Linear(parts["o_proj"], parts.get("o_bias"))
        self._norms = _qk_norms(arch, parts)
        self._epsilon = torch.tensor(arch.rms_norm_eps)
        self._rotates = layer not in variant.layers_without_rope
        self._rule = Rule(variant.scale, variant.span(layer), parts.get("sinks"))
        self._num_queries = arch.num_heads * arch.head_dim

    @property
    def qk_norm_CD(self) -> torch.Tensor | None:
        """The weights of the norm of each query and key head; None where the layer has anything but that norm."""
        variant = self._arch.attention
        is_plain = variant.qk_norm == "head" and variant.clip is None and self._rotates and self._rule.is_plain
        return self._norms[0].weight if is_plain else None

    def __call__(self, normed_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Returns [T, H]; the step's keys and values go into the cache."""
        qkv_TF = self.qkv(normed_TH)
        self._normalise(qkv_TF)
        if self._arch.attention.clip is not None:
            qkv_TF.clamp_(-self._arch.attention.clip, self._arch.attention.clip)
        qkv_THD = qkv_TF.view(len(qkv_TF), -1, self._arch.head_dim)
        self._place(qkv_THD, context)
        return self.o(self._kv_cache.attend(self._layer, qkv_THD, context.index, self._rule))

    def _normalise(self, qkv_TF: torch.Tensor) -> None:
        """Queries and keys head by head, or each as a row."""
        if not self._norms:
            return
        size = self._num_queries + self._arch.num_kv_heads * self._arch.head_dim
        if len(self._norms) == 1:
            qk_TCD = qkv_TF[:, :size].view(len(qkv_TF), -1, self._arch.head_dim)
            qk_TCD.copy_(self._norms[0](qk_TCD))
            return
        for norm, row in zip(self._norms, (slice(self._num_queries), slice(self._num_queries, size)), strict=True):
            qkv_TF[:, row] = norm(qkv_TF[:, row])

    def _place(self, qkv_THD: torch.Tensor, context: StepContext) -> None:
        """Give queries and keys their positions."""
        variant = self._arch.attention
        if self._rotates:
            qk_TCD = qkv_THD[:, : -self._arch.num_kv_heads]
            qk_TCD.copy_(rotate(qk_TCD, context.rotation_T1R))
            if variant.qk_norm == "l2_rotated":
                qk_TCD.copy_(normalise(qk_TCD, self._epsilon))
        elif variant.temperature is not None:
            steps_T = ((context.index.position_T.float() + 1) / variant.temperature.floor).floor_()
            scale_T = steps_T.log1p_().mul_(variant.temperature.scale).add_(1)
            qkv_THD[:, : self._arch.num_heads].mul_(scale_T[:, None, None])


def _qk_norms(arch: Architecture, parts: Parts) -> tuple[RmsNorm, ...]:
    """One norm of all heads, or one of the queries' row and one of the keys'."""
    if arch.attention.qk_norm not in ("head", "row"):
        return ()
    q, k = (pair_features(parts[f"{name}_norm"], arch.head_dim, arch.rope) for name in "qk")
    if arch.attention.qk_norm == "row":
        return RmsNorm(q, arch.rms_norm_eps), RmsNorm(k, arch.rms_norm_eps)
    heads = [q.expand(arch.num_heads, -1), k.expand(arch.num_kv_heads, -1)]
    return (RmsNorm(torch.cat(heads), arch.rms_norm_eps),)


def join_qkv(parts: Parts, kind: str, arch: Architecture) -> torch.Tensor:
    """The query, key and value projections' weights or biases as one, in our order of features."""
    q, k = (pair_features(parts[f"{name}_{kind}"], arch.head_dim, arch.rope) for name in "qk")
    return torch.cat([q, k, parts[f"v_{kind}"]])
