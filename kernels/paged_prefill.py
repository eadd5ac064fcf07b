"""Causal attention of chunks of prompts over a paged KV cache, grouped queries (Dao 2023, "FlashAttention-2").

A chunk's keys and values are in the cache already, behind those of its prefix, so chunks with and without a cached
prefix are one case.

Dimensions: T tokens of all chunks, S sequences, H query heads, R of them share one of K KV heads; D head size; B blocks
of P positions; W blocks that a table names; C programs' worth of queries; Q queries and L positions at a time.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import IS_INTERPRETED, dot

_LOG2_E = 1.4426950408889634
QUERIES = 128 if not IS_INTERPRETED else 16
_POSITIONS = 64 if not IS_INTERPRETED else 16


def prefill_pieces(counts_S: npt.NDArray[np.int64], starts_S: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Blocks of queries of a step, on the host; sequence s has ``counts_S[s]`` tokens in it, in the order of sequences,
    the first at position ``starts_S[s]``.

    Returns:
        int32 [C, 4]: the piece's sequence, its first token in the step, that one's position, the queries. Long
        contexts come first, so that short ones fill the end.
    """
    pieces_S = -(-counts_S // QUERIES)
    seq_C = np.repeat(np.arange(len(counts_S)), pieces_S)
    within_C = (np.arange(len(seq_C)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)) * QUERIES
    token_C = (np.cumsum(counts_S) - counts_S)[seq_C] + within_C
    position_C = starts_S[seq_C] + within_C
    number_C = np.minimum(counts_S[seq_C] - within_C, QUERIES)
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
) -> None:
    """softmax(q · keys / √D) · values of each query over the positions up to its own; into ``out_THD``.

    Args:
        q_THD: bfloat16 or float32, features contiguous; the R heads of a KV head together. D a power of two, at least
            16.
        key_BPKD, value_BPKD: q's dtype, any strides but the last's, 1.
        blocks_SW: int32 or int64 block tables; entries beyond a length are not read.
        pieces_C4: of ``prefill_pieces``; tokens in no piece are left alone.
        out_THD: q's dtype, contiguous.
    """
    num_heads, head_dim = q_THD.shape[1:]
    block_size, num_kv_heads = key_BPKD.shape[1:3]
    if not len(pieces_C4):
        return
    _paged_prefill_kernel[(num_heads, len(pieces_C4))](
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
        BLOCK_Q=QUERIES,
        BLOCK_L=_POSITIONS,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        WIDENS=IS_INTERPRETED,
        num_warps=8,
        num_stages=1 if q_THD.dtype == torch.float32 else 3,
    )


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
    BLOCK_Q: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
):
    head = tl.program_id(0)
    piece = pieces + tl.program_id(1) * 4
    seq = tl.load(piece).to(tl.int64)
    token = tl.load(piece + 1).to(tl.int64)
    position = tl.load(piece + 2)
    number = tl.load(piece + 3)
    n_Q = tl.arange(0, BLOCK_Q)
    d_D = tl.arange(0, HEAD_DIM)
    l_L = tl.arange(0, BLOCK_L)
    at_QD = (token + n_Q)[:, None] * q_stride_t + head * q_stride_h + d_D[None, :]
    q_QD = tl.load(q + at_QD, mask=(n_Q < number)[:, None], other=0.0)
    table = blocks + seq * blocks_stride
    key += head // SHARED * key_stride_k
    value += head // SHARED * value_stride_k
    top_Q = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total_Q = tl.zeros((BLOCK_Q,), tl.float32)
    acc_QD = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    end = position + number
    for first in range(0, end, BLOCK_L):
        # The tail reads the last position again and gives it no weight: no load needs a mask.
        read_L = tl.minimum(first + l_L, end - 1)
        block_L = tl.load(table + read_L // BLOCK_SIZE).to(tl.int64)
        within_L = read_L % BLOCK_SIZE
        key_LD = tl.load(key + (block_L * key_stride_b + within_L * key_stride_p)[:, None] + d_D[None, :])
        value_LD = tl.load(value + (block_L * value_stride_b + within_L * value_stride_p)[:, None] + d_D[None, :])
        score_QL = dot(q_QD, tl.trans(key_LD), tl.zeros((BLOCK_Q, BLOCK_L), tl.float32), PRECISION, WIDENS)
        is_seen_QL = (first + l_L)[None, :] <= (position + n_Q)[:, None]
        # Position 0 is seen by every query, so no row of the first round is empty.
        score_QL = tl.where(is_seen_QL, score_QL * scale, float("-inf"))
        new_top_Q = tl.maximum(top_Q, tl.max(score_QL, 1))
        weight_QL = tl.exp2(score_QL - new_top_Q[:, None])
        factor_Q = tl.exp2(top_Q - new_top_Q)
        total_Q = total_Q * factor_Q + tl.sum(weight_QL, 1)
        acc_QD = dot(weight_QL.to(value_LD.dtype), value_LD, acc_QD * factor_Q[:, None], PRECISION, WIDENS)
        top_Q = new_top_Q
    num_heads = tl.num_programs(0)
    to_QD = out + ((token + n_Q) * num_heads + head)[:, None] * HEAD_DIM + d_D[None, :]
    tl.store(to_QD, (acc_QD / total_Q[:, None]).to(out.dtype.element_ty), mask=(n_Q < number)[:, None])
