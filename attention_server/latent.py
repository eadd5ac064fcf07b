"""Multi-head latent attention (arXiv:2405.04434), absorbed: the KV cache holds what is compressed, nothing else.

A head's key is W_k·c, beside the rotated part that all heads share, and its value W_v·c, where c is the token's
compressed row. So q·(W_k·c) = (W_kᵀ·q)·c: queries go into the compressed space, attention runs there with one row a
token for all heads, and W_v is applied to its answer.

Dimensions: T tokens, H hidden size, N heads, C compressed, R rotated, V value size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expertmesh.attention_server.context import StepContext
from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.norm import RmsNorm
from expertmesh.attention_server.paged import PagedKvCache, Rule
from expertmesh.attention_server.rope import pair_features, rotate
from expertmesh.mesh.model.architecture import Architecture, Rope

LATENT_EPS = 1e-6
"""Of the norms of what is compressed, whatever config.json says of the others: so in transformers."""

Parts = Mapping[str, torch.Tensor]


class LatentAttention:
    """One layer's attention, from the normed residual stream to what is added to it."""

    def __init__(self, arch: Architecture, layer: int, parts: Parts, kv_cache: PagedKvCache) -> None:
        latent = arch.attention.latent
        assert latent is not None, "the model has no latent attention"
        self._latent, self._num_heads, self._layer, self._kv_cache = latent, arch.num_heads, layer, kv_cache
        head, rank = latent.nope_dim + latent.rope_dim, latent.kv_rank
        kv_a = _pair_last(parts["kv_a_proj"], rank + latent.rope_dim, latent.rope_dim, arch.rope)
        kv_a_bias = parts.get("kv_a_bias")
        if kv_a_bias is not None:
            kv_a_bias = _pair_last(kv_a_bias, rank + latent.rope_dim, latent.rope_dim, arch.rope)
        if latent.q_rank is None:
            q = _pair_last(parts["q_proj"], head, latent.rope_dim, arch.rope)
            # Plain queries have no bias, whatever the compressed keys and values have.
            q_bias = None if kv_a_bias is None else torch.zeros(len(q), dtype=q.dtype)
            self._q_norm = self._q_up = None
        else:
            q, q_bias = parts["q_a_proj"], parts.get("q_a_bias")
            self._q_norm = RmsNorm(parts["q_a_norm"], LATENT_EPS)
            self._q_up = Linear(_pair_last(parts["q_b_proj"], head, latent.rope_dim, arch.rope))
        bias = None if q_bias is None or kv_a_bias is None else torch.cat([q_bias, kv_a_bias])
        self._down = Linear(torch.cat([q, kv_a]), bias)
        self._kv_norm = RmsNorm(parts["kv_a_norm"], LATENT_EPS)
        up = parts["kv_b_proj"].view(arch.num_heads, latent.nope_dim + latent.value_dim, rank)
        self._key_NKC = up[:, : latent.nope_dim].contiguous()
        self._value_NCV = up[:, latent.nope_dim :].transpose(1, 2).contiguous()
        self._o = Linear(parts["o_proj"], parts.get("o_bias"))
        self._rule = Rule(arch.attention.scale, arch.attention.span(layer))

    def __call__(self, normed_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """Returns [T, H]; the step's compressed rows go into the cache."""
        latent, num_tokens = self._latent, len(normed_TH)
        down = self._down(normed_TH)
        sizes = [down.shape[1] - latent.kv_rank - latent.rope_dim, latent.kv_rank, latent.rope_dim]
        q, row_TC, turned_TR = torch.split(down, sizes, dim=1)
        if self._q_up is not None and self._q_norm is not None:
            q = self._q_up(self._q_norm(q))
        q_TND = q.view(num_tokens, self._num_heads, -1)
        # Queries, then the one row that is key and value of all heads.
        rows = q.new_empty(num_tokens, self._num_heads + 1, latent.kv_rank + latent.rope_dim)
        plain_NTK = q_TND[..., : latent.nope_dim].transpose(0, 1)
        rows[:, :-1, : latent.kv_rank] = torch.bmm(plain_NTK, self._key_NKC).transpose(0, 1)
        rows[:, -1, : latent.kv_rank] = self._kv_norm(row_TC)
        rows[:, :-1, latent.kv_rank :] = q_TND[..., latent.nope_dim :]
        rows[:, -1, latent.kv_rank :] = turned_TR
        turning = rows[..., latent.kv_rank :].contiguous()
        rows[..., latent.kv_rank :] = rotate(turning, context.rotation_T1R)
        answer = self._kv_cache.attend(self._layer, rows, context.index, self._rule)
        answer_NTC = answer.view(num_tokens, self._num_heads, -1)[..., : latent.kv_rank].transpose(0, 1)
        value_TNV = torch.bmm(answer_NTC, self._value_NCV).transpose(0, 1)
        return self._o(value_TNV.reshape(num_tokens, -1))


def _pair_last(rows: torch.Tensor, head_dim: int, rope_dim: int, rope: Rope) -> torch.Tensor:
    """``pair_features`` of the last ``rope_dim`` rows of each head."""
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    turning = heads[:, head_dim - rope_dim :]
    paired = pair_features(turning.reshape(-1, *rows.shape[1:]), rope_dim, rope).view(turning.shape)
    return torch.cat([heads[:, : head_dim - rope_dim], paired], dim=1).view(rows.shape)
