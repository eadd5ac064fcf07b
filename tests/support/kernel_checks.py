"""Kernels against their references, on any device: the unit tests run them in Triton's interpreter, tests/gpu on a GPU.

Imports the kernels alone, so that it runs on a machine that has no more than torch and Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertmesh.kernels.few_rows import TILING, Tiling, parts_of_product
from expertmesh.kernels.fp8_rows import (
    BLOCK,
    dequantize_rows,
    dequantize_rows_reference,
    quantize_rows,
    quantize_rows_reference,
)
from expertmesh.kernels.norm import add_rms_norm, add_rms_norm_reference
from expertmesh.kernels.paged_decode import (
    DecodePlan,
    Tuning,
    paged_decode_attention,
    paged_decode_attention_reference,
)
from expertmesh.kernels.rope_append import rope_append, rope_append_reference
from expertmesh.kernels.sampler import gumbel_argmax, gumbel_argmax_reference
from support.kernel_draws import Draw, assert_near, in_parts, poisoned


def check_paged_decode(
    device: str,
    lengths: Sequence[int],
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    tuning: Tuning | None = None,
    launches: int = 2,
) -> None:
    """Runs ``launches`` times with one plan: what one leaves behind must not disturb the next."""
    draw = Draw(sum(lengths) * 100 + heads, device)
    num_seqs = len(lengths)
    blocks_a_seq = -(-max(lengths) // block_size) + 1
    num_blocks = num_seqs * blocks_a_seq + 3
    # Keys and values side by side, as the cache keeps them; positions beyond a length hold NaN.
    cache = draw.normal(num_blocks, block_size, 2 * kv_heads, head_dim, dtype=dtype)
    blocks_ST = draw.order(num_blocks)[: num_seqs * blocks_a_seq].view(num_seqs, blocks_a_seq).to(torch.int32)
    for s, length in enumerate(lengths):
        positions = torch.arange(length, blocks_a_seq * block_size, device=device)
        cache[blocks_ST[s, positions // block_size].long(), positions % block_size] = float("nan")
    q_SHD = draw.normal(num_seqs, heads, head_dim, dtype=dtype)
    lengths_S = torch.tensor(lengths, device=device, dtype=torch.int32)
    plan = DecodePlan(
        max_seqs=num_seqs + 1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        device=torch.device(device),
        tuning=tuning,
    )
    plan.update(lengths_S)
    key, value = cache[:, :, :kv_heads], cache[:, :, kv_heads:]
    expected = paged_decode_attention_reference(q_SHD, key, value, blocks_ST, lengths_S)
    results = []
    for _ in range(launches):
        with poisoned():
            results.append(paged_decode_attention(q_SHD, key, value, blocks_ST, lengths_S, plan=plan))
        assert_near(results[-1], expected, dtype)
        assert torch.equal(results[-1], results[0]), "two launches differ"


def check_product_of_few(device: str, num_rows: int, num_columns: int, depth: int, tiling: Tiling = TILING) -> None:
    """Rows as few as that come in parts, whose sum is the product."""
    draw = Draw(num_rows + num_columns + depth, device)
    x_TK = draw.normal(num_rows, depth, dtype=torch.bfloat16)
    weight_NK = draw.normal(num_columns, depth, dtype=torch.bfloat16) / depth**0.5
    with poisoned():
        parts_PTN = parts_of_product(x_TK, weight_NK, tiling)
    assert parts_PTN.shape[1:] == (num_rows, num_columns)
    assert_near(parts_PTN.sum(0).bfloat16(), x_TK @ weight_NK.T, torch.bfloat16)


def check_add_rms_norm(device: str, num_tokens: int, hidden: int, dtype: torch.dtype, *, num_parts: int = 1) -> None:
    draw = Draw(num_tokens + hidden, device)
    x_TH, residual_TH = (draw.normal(num_tokens, hidden, dtype=dtype) for _ in range(2))
    x_TH = in_parts(x_TH, num_parts)
    weight_H = draw.normal(hidden, dtype=dtype)
    expected_residual_TH = residual_TH.clone()
    with poisoned():
        actual = add_rms_norm(x_TH, residual_TH, weight_H, 1e-6)
    expected = add_rms_norm_reference(x_TH, expected_residual_TH, weight_H, 1e-6)
    assert_near(residual_TH, expected_residual_TH, dtype)
    assert_near(actual, expected, dtype)


def check_rope_append(
    device: str,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    has_norm: bool = True,
    num_parts: int = 1,
) -> None:
    """One token is padding; nothing but the tokens' places may change in the cache."""
    draw = Draw(num_tokens * 10 + heads, device)
    num_places, length = 2 * num_tokens + 5, 50
    qkv_TCD = in_parts(draw.normal(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype), num_parts)
    norm_CD = draw.normal(heads + kv_heads, head_dim, dtype=dtype) if has_norm else None
    angle_LR = 10 * draw.normal(length, head_dim // 2)
    position_T = draw.integers(length, num_tokens)
    place_T = draw.order(num_places)[:num_tokens]
    place_T[num_tokens // 2] = -1
    cache_NCD = draw.normal(num_places, 2 * kv_heads, head_dim, dtype=dtype)
    expected_cache = cache_NCD.clone()
    tables = (1e-6, angle_LR.cos(), angle_LR.sin(), position_T, place_T)
    expected_key, expected_value = expected_cache[:, :kv_heads], expected_cache[:, kv_heads:]
    expected = rope_append_reference(qkv_TCD, norm_CD, *tables, expected_key, expected_value)
    with poisoned():
        q_THD = rope_append(qkv_TCD, norm_CD, *tables, cache_NCD[:, :kv_heads], cache_NCD[:, kv_heads:])
    assert_near(q_THD, expected, dtype)
    assert_near(cache_NCD, expected_cache, dtype)
    kept = place_T[place_T >= 0]
    untouched = torch.ones(num_places, dtype=torch.bool, device=device).index_fill_(0, kept, False)
    assert torch.equal(cache_NCD[untouched], expected_cache[untouched])
    assert torch.equal(cache_NCD[kept, kv_heads:], expected_cache[kept, kv_heads:]), "values are copied, not computed"


def check_gumbel_argmax(device: str, num_seqs: int, vocab: int, dtype: torch.dtype) -> None:
    """Tokens equal the reference's; every fourth sequence is greedy, and forbidden tokens are never taken."""
    draw = Draw(num_seqs + vocab, device)
    logits_SV = 3 * draw.normal(num_seqs, vocab)
    logits_SV[:, ::3] = float("-inf")
    logits_SV = logits_SV.to(dtype)
    temperature_S = draw.normal(num_seqs).abs() + 0.1
    temperature_S[::4] = 0
    seed_S = draw.integers(2**62, num_seqs) - 2**61
    position_S = draw.integers(2**31, num_seqs)
    with poisoned():
        actual = gumbel_argmax(logits_SV, temperature_S, seed_S, position_S)
    assert torch.equal(actual, gumbel_argmax_reference(logits_SV, temperature_S, seed_S, position_S))
    assert torch.equal(actual[::4], logits_SV[::4].float().argmax(-1))
    assert not (actual % 3 == 0).any()


def check_fp8_rows(device: str, num_tokens: int, hidden: int, end: int, dtype: torch.dtype) -> None:
    """The kernels against plain torch, and what is left of the tokens."""
    x_TH = Draw(num_tokens + hidden, device).normal(num_tokens, hidden, dtype=dtype)
    if num_tokens > 1:
        x_TH[1, :BLOCK] = 0.0
    end_1 = torch.tensor([end], dtype=torch.int32, device=device)
    with poisoned():
        q_TH, scale_TB = quantize_rows(x_TH)
        back_TH = dequantize_rows(q_TH, scale_TB, end_1)
    expected_q_TH, expected_scale_TB = quantize_rows_reference(x_TH)
    assert_near(scale_TB, expected_scale_TB, torch.float32)
    # A quotient in the middle between two numbers may go either way: one step of 3 bits. The interpreter, which
    # rounds by hand, loses a carry into the exponent now and then.
    step, noise = (1 / 8, 0.04) if x_TH.is_cuda else (1 / 2, 0.1)
    q32_TH, expected_TH = q_TH.float(), expected_q_TH.float()
    assert ((q32_TH - expected_TH).abs() <= expected_TH.abs() * step + 2**-9).all()
    assert_near(back_TH[:end], dequantize_rows_reference(q_TH, scale_TB, end_1)[:end], torch.bfloat16)
    assert (back_TH[:end] - x_TH[:end]).float().norm() <= noise * x_TH[:end].float().norm()
