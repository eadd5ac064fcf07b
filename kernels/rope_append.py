"""QK-norm, rotary embedding and storing keys and values into the paged cache, in one launch.

Dimensions: T tokens, H query heads, K KV heads, D head size, L positions in the tables. A head's features are in pairs,
side by side, that the rotary embedding (Su et al. 2021, "RoFormer") turns together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import OVERLAPPING, OVERLAPS, sum_of_parts

_HEADS_A_PROGRAM = 8


def rope_append_reference(
    qkv_TCD: torch.Tensor,
    norm_CD: torch.Tensor | None,
    eps: float,
    cos_LR: torch.Tensor,
    sin_LR: torch.Tensor,
    position_T: torch.Tensor,
    place_T: torch.Tensor,
    key_NKD: torch.Tensor,
    value_NKD: torch.Tensor,
) -> torch.Tensor:
    """``rope_append`` in plain torch."""
    num_kv_heads = key_NKD.shape[1]
    if qkv_TCD.dim() == 4:
        qkv_TCD = qkv_TCD.sum(0).to(key_NKD.dtype)
    qk_TCD = qkv_TCD[:, :-num_kv_heads].float()
    if norm_CD is not None:
        scale_TC1 = (qk_TCD.square().mean(-1, keepdim=True) + eps).rsqrt()
        qk_TCD = ((qk_TCD * scale_TC1).to(qkv_TCD.dtype) * norm_CD).float()
    cos_T1R, sin_T1R = cos_LR[position_T][:, None], sin_LR[position_T][:, None]
    even, odd = qk_TCD[..., 0::2], qk_TCD[..., 1::2]
    turned = torch.stack([even * cos_T1R - odd * sin_T1R, even * sin_T1R + odd * cos_T1R], -1).flatten(-2)
    turned = turned.to(qkv_TCD.dtype)
    kept = place_T >= 0
    key_NKD[place_T[kept]] = turned[:, -num_kv_heads:][kept]
    value_NKD[place_T[kept]] = qkv_TCD[:, -num_kv_heads:][kept]
    return turned[:, :-num_kv_heads]


def rope_append(
    qkv_TCD: torch.Tensor,
    norm_CD: torch.Tensor | None,
    eps: float,
    cos_LR: torch.Tensor,
    sin_LR: torch.Tensor,
    position_T: torch.Tensor,
    place_T: torch.Tensor,
    key_NKD: torch.Tensor,
    value_NKD: torch.Tensor,
) -> torch.Tensor:
    """Norm and turn queries and keys; the keys and the values go into the cache.

    Storing again stores the same: a step may be repeated.

    Args:
        qkv_TCD: bfloat16 or float32 [T, H + 2K, D], heads and features contiguous: query, key, value heads. D a power
            of two. Or the parts of a product, [P, T, H + 2K, D], see ``few_rows``.
        norm_CD: [H + K, D] QK-norm weights in the same dtype, None = the model has no QK-norm.
        cos_LR, sin_LR: float32 [L, D/2].
        position_T: int32 or int64, 0 .. L-1.
        place_T: int32 or int64, rows of the cache; -1 = the token is padding and stores nothing.
        key_NKD, value_NKD: the cache, positions of all blocks in a row, any strides but the last's, 1.

    Returns:
        q_THD: where ``qkv`` is no parts of a product, in its memory.
    """
    num_tokens, num_heads_all, head_dim = qkv_TCD.shape[-3:]
    num_kv_heads = key_NKD.shape[1]
    num_heads = num_heads_all - 2 * num_kv_heads
    are_parts = qkv_TCD.dim() == 4
    q_THD = key_NKD.new_empty(num_tokens, num_heads, head_dim) if are_parts else qkv_TCD[:, :num_heads]
    if num_tokens == 0:
        return q_THD
    _rope_append_kernel[(num_tokens, triton.cdiv(num_heads_all, _HEADS_A_PROGRAM))](
        qkv_TCD,
        q_THD,
        qkv_TCD if norm_CD is None else norm_CD,
        cos_LR,
        sin_LR,
        position_T,
        place_T,
        key_NKD,
        value_NKD,
        eps,
        qkv_TCD.stride(-3),
        q_THD.stride(0),
        *key_NKD.stride()[:2],
        *value_NKD.stride()[:2],
        Q_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        PAIRS=head_dim // 2,
        HEADS=_HEADS_A_PROGRAM,
        HAS_NORM=norm_CD is not None,
        NUM_PARTS=len(qkv_TCD) if are_parts else 1,
        OVERLAPS=OVERLAPS,
        num_warps=2,
        **OVERLAPPING,
    )
    return q_THD


@triton.jit
def _rope_append_kernel(
    qkv,
    q,
    norm,
    cos,
    sin,
    positions,
    places,
    key,
    value,
    eps,
    qkv_stride,
    q_stride,
    key_stride_n,
    key_stride_k,
    value_stride_n,
    value_stride_k,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    dtype = key.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    head_C = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair_R = tl.arange(0, PAIRS)
    d_D = tl.arange(0, 2 * PAIRS)
    is_in = (head_C < Q_HEADS + 2 * KV_HEADS)[:, None]
    is_turned = (head_C < Q_HEADS + KV_HEADS)[:, None]
    in_head = head_C[:, None] * (2 * PAIRS) + d_D[None, :]
    # What belongs to the step was there before its first launch: only what the layer computed is to be waited for.
    row = tl.load(positions + token).to(tl.int64) * PAIRS
    cos_1R = tl.load(cos + row + pair_R)[None, :]
    sin_1R = tl.load(sin + row + pair_R)[None, :]
    place = tl.load(places + token).to(tl.int64)
    if HAS_NORM:
        weight = tl.load(norm + in_head, mask=is_turned, other=0.0)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    raw = sum_of_parts(qkv, token * qkv_stride + in_head, tl.num_programs(0) * qkv_stride, is_in, NUM_PARTS).to(dtype)
    x = raw.to(tl.float32)
    if HAS_NORM:
        scale_C = tl.rsqrt(tl.sum(x * x, 1) / (2 * PAIRS) + eps)
        x = ((x * scale_C[:, None]).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype).to(tl.float32)
    x = tl.reshape(x, (HEADS, PAIRS, 2))
    even_CR, odd_CR = tl.split(x)
    turned = tl.join(even_CR * cos_1R - odd_CR * sin_1R, even_CR * sin_1R + odd_CR * cos_1R)
    turned = tl.reshape(turned, (HEADS, 2 * PAIRS)).to(dtype)
    is_query = (head_C < Q_HEADS)[:, None]
    tl.store(q + token * q_stride + in_head, turned, mask=is_query)
    is_kept = place >= 0
    kv_head = head_C - Q_HEADS
    to_key = key + place * key_stride_n + kv_head[:, None] * key_stride_k + d_D[None, :]
    tl.store(to_key, turned, mask=is_turned & (head_C >= Q_HEADS)[:, None] & is_kept)
    to_value = value + place * value_stride_n + (kv_head - KV_HEADS)[:, None] * value_stride_k + d_D[None, :]
    tl.store(to_value, raw, mask=is_in & (head_C >= Q_HEADS + KV_HEADS)[:, None] & is_kept)
