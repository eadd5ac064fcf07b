"""Causal attention of chunks of prompts over a paged KV cache, grouped queries (Dao 2023, "FlashAttention-2").

A chunk's keys and values are in the cache already, behind those of its prefix, so chunks with and without a cached
prefix are one case. The query heads that share a KV head are rows of one product: a program has few tokens and many
rows, so that little of what it computes is masked, and a chunk of few tokens wastes little.

Dimensions: T tokens of all chunks, S sequences, H query heads, R of them share one of K KV heads; D head size; B blocks
of P positions; W blocks that a table names; C programs' worth of queries; at a time M rows, which are queries of R
heads, and L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import IS_INTERPRETED, block_of, dot

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Tuning:
    """``rows`` of queries of all heads that share a KV head, and positions, at a time; a program's warps and stages.

    ``registers``: the most that a thread may have, None = as many as it wants.
    """

    rows: int
    positions: int
    warps: int
    stages: int
    registers: int | None = None


TUNING = Tuning(128, 64, 8, 2, 128) if not IS_INTERPRETED else Tuning(16, 16, 4, 2)
"""Measured by ``benchmarks/gpu/kernels.py --sweep``."""


def queries_a_piece(num_heads: int, num_kv_heads: int, tuning: Tuning = TUNING) -> int:
    """Tokens whose queries one program takes."""
    return max(1, tuning.rows // (num_heads // num_kv_heads))


def prefill_pieces(
    counts_S: npt.NDArray[np.int64], starts_S: npt.NDArray[np.int64], queries: int
) -> npt.NDArray[np.int32]:
    """Blocks of ``queries`` tokens of a step, on the host; sequence s has ``counts_S[s]`` tokens in it, in the order of
    sequences, the first at position ``starts_S[s]``.

    Returns:
        int32 [C, 4]: the piece's sequence, its first token in the step, that one's position, the tokens. Long
        contexts come first, so that short ones fill the end.
    """
    pieces_S = -(-counts_S // queries)
    seq_C = np.repeat(np.arange(len(counts_S)), pieces_S)
    within_C = (np.arange(len(seq_C)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)) * queries
    token_C = (np.cumsum(counts_S) - counts_S)[seq_C] + within_C
    position_C = starts_S[seq_C] + within_C
    number_C = np.minimum(counts_S[seq_C] - within_C, queries)
    pieces_C4 = np.stack([seq_C, token_C, position_C, number_C], axis=1).astype(np.int32)
    return pieces_C4[np.argsort(-position_C, kind="stable")]


def paged_prefill_attention_reference(
    q_THD: torch.Tensor,
    key_BPKD: torch.Tensor,
    value_BPKD: torch.Tensor,
    blocks_SW: torch.Tensor,
    pieces_C4: torch.Tensor,
) -> torch.Tensor:
    """``paged_prefill_attention`` in plain torch and float32, a loop over pieces."""
    block_size, num_kv_heads, head_dim = key_BPKD.shape[1:]
    out_THD = torch.zeros_like(q_THD)
    for seq, token, position, number in pieces_C4.tolist():
        length = position + number
        blocks = blocks_SW[seq, : -(-length // block_size)].long()
        key_LKD, value_LKD = (
            cache[blocks].float().reshape(-1, num_kv_heads, head_dim)[:length] for cache in (key_BPKD, value_BPKD)
        )
        q_QKRD = q_THD[token : token + number].float().unflatten(1, (num_kv_heads, -1))
        score = torch.einsum("qkrd,lkd->qkrl", q_QKRD, key_LKD) * head_dim**-0.5
        limit_Q = position + torch.arange(number, device=q_THD.device)
        hidden_QL = torch.arange(length, device=q_THD.device) > limit_Q[:, None]
        score.masked_fill_(hidden_QL[:, None, None, :], float("-inf"))
        out = torch.einsum("qkrl,lkd->qkrd", score.softmax(-1), value_LKD)
        out_THD[token : token + number] = out.flatten(1, 2).to(q_THD.dtype)
    return out_THD


def paged_prefill_attention(
    q_THD: torch.Tensor,
    key_BPKD: torch.Tensor,
    value_BPKD: torch.Tensor,
    blocks_SW: torch.Tensor,
    pieces_C4: torch.Tensor,
    out_THD: torch.Tensor,
    *,
    tuning: Tuning = TUNING,
) -> None:
    """softmax(q · keys / √D) · values of each query over the positions up to its own; into ``out_THD``.

    Args:
        q_THD: bfloat16 or float32, features contiguous; the R heads of a KV head together. D a power of two, at least
            16.
        key_BPKD, value_BPKD: q's dtype, any strides but the last's, 1.
        blocks_SW: int32 or int64 block tables; entries beyond a length are not read.
        pieces_C4: of ``prefill_pieces`` with ``queries_a_piece`` tokens each; tokens in no piece are left alone.
        out_THD: q's dtype, contiguous.
        tuning: the default is the measured one; that of the pieces.
    """
    num_heads, head_dim = q_THD.shape[1:]
    block_size, num_kv_heads = key_BPKD.shape[1:3]
    if not len(pieces_C4):
        return
    _paged_prefill_kernel[(num_kv_heads, len(pieces_C4))](
        q_THD,
        key_BPKD,
        value_BPKD,
        blocks_SW,
        pieces_C4,
        out_THD,
        head_dim**-0.5 * _LOG2_E,
        *q_THD.stride()[:2],
        *key_BPKD.stride()[:3],
        *value_BPKD.stride()[:3],
        blocks_SW.stride(0),
        SHARED=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=max(tuning.rows, triton.next_power_of_2(num_heads // num_kv_heads)),
        BLOCK_L=tuning.positions,
        STAGES=1 if q_THD.dtype == torch.float32 else tuning.stages,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        WIDENS=IS_INTERPRETED,
        num_warps=tuning.warps,
        maxnreg=tuning.registers,
    )


@triton.jit
def _rows_of(cache, block_L, position_L, end, stride_b, stride_p, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Keys or values of one head at positions whose blocks are known."""
    within_L = tl.minimum(position_L, end - 1) % BLOCK_SIZE
    at_L = block_L * stride_b + within_L * stride_p
    return tl.load(cache + at_L[:, None] + tl.arange(0, HEAD_DIM)[None, :])


@triton.jit
def _attend(score_ML, value_LD, top_M, total_M, acc_MD, scale, PRECISION: tl.constexpr, WIDENS: tl.constexpr):
    """One round of the softmax that goes along; ``scale`` is positive."""
    new_top_M = tl.maximum(top_M, tl.max(score_ML, 1) * scale)
    weight_ML = tl.exp2(score_ML * scale - new_top_M[:, None])
    factor_M = tl.exp2(top_M - new_top_M)
    total_M = total_M * factor_M + tl.sum(weight_ML, 1)
    acc_MD = dot(weight_ML.to(value_LD.dtype), value_LD, acc_MD * factor_M[:, None], PRECISION, WIDENS)
    return new_top_M, total_M, acc_MD


@triton.jit
def _paged_prefill_kernel(
    q,
    key,
    value,
    blocks,
    pieces,
    out,
    scale,
    q_stride_t,
    q_stride_h,
    key_stride_b,
    key_stride_p,
    key_stride_k,
    value_stride_b,
    value_stride_p,
    value_stride_k,
    blocks_stride,
    SHARED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
):
    kv_head = tl.program_id(0)
    piece = pieces + tl.program_id(1) * 4
    seq = tl.load(piece).to(tl.int64)
    token = tl.load(piece + 1).to(tl.int64)
    position = tl.load(piece + 2)
    number = tl.load(piece + 3)
    n_M = tl.arange(0, BLOCK_M) // SHARED
    head_M = kv_head * SHARED + tl.arange(0, BLOCK_M) % SHARED
    d_D = tl.arange(0, HEAD_DIM)
    l_L = tl.arange(0, BLOCK_L)
    at_M = (token + n_M) * q_stride_t + head_M * q_stride_h
    q_MD = tl.load(q + at_M[:, None] + d_D[None, :], mask=(n_M < number)[:, None], other=0.0)
    table = blocks + seq * blocks_stride
    key += kv_head * key_stride_k
    value += kv_head * value_stride_k
    top_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total_M = tl.zeros((BLOCK_M,), tl.float32)
    acc_MD = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    end = position + number
    # Blocks are looked up a round ahead, so that no round waits for an address.
    block_L = block_of(table, l_L, end, BLOCK_SIZE, WIDENS)
    seen_by_all = (position + 1) // BLOCK_L * BLOCK_L
    for first in tl.range(0, seen_by_all, BLOCK_L, num_stages=STAGES):
        key_LD = _rows_of(key, block_L, first + l_L, end, key_stride_b, key_stride_p, HEAD_DIM, BLOCK_SIZE)
        value_LD = _rows_of(value, block_L, first + l_L, end, value_stride_b, value_stride_p, HEAD_DIM, BLOCK_SIZE)
        block_L = block_of(table, first + BLOCK_L + l_L, end, BLOCK_SIZE, WIDENS)
        score_ML = dot(q_MD, tl.trans(key_LD), tl.zeros((BLOCK_M, BLOCK_L), tl.float32), PRECISION, WIDENS)
        top_M, total_M, acc_MD = _attend(score_ML, value_LD, top_M, total_M, acc_MD, scale, PRECISION, WIDENS)
    for first in tl.range(seen_by_all, end, BLOCK_L, num_stages=1):
        key_LD = _rows_of(key, block_L, first + l_L, end, key_stride_b, key_stride_p, HEAD_DIM, BLOCK_SIZE)
        value_LD = _rows_of(value, block_L, first + l_L, end, value_stride_b, value_stride_p, HEAD_DIM, BLOCK_SIZE)
        block_L = block_of(table, first + BLOCK_L + l_L, end, BLOCK_SIZE, WIDENS)
        score_ML = dot(q_MD, tl.trans(key_LD), tl.zeros((BLOCK_M, BLOCK_L), tl.float32), PRECISION, WIDENS)
        # Position 0 is seen by every query, so no row of the first round is empty. Rows of no token see it all.
        is_seen_ML = (first + l_L)[None, :] <= (position + n_M)[:, None]
        score_ML = tl.where(is_seen_ML, score_ML, float("-inf"))
        top_M, total_M, acc_MD = _attend(score_ML, value_LD, top_M, total_M, acc_MD, scale, PRECISION, WIDENS)
    num_heads = tl.num_programs(0) * SHARED
    to_MD = out + ((token + n_M) * num_heads + head_M)[:, None] * HEAD_DIM + d_D[None, :]
    tl.store(to_MD, (acc_MD / total_M[:, None]).to(out.dtype.element_ty), mask=(n_M < number)[:, None])
