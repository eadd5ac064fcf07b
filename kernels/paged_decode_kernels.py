"""The kernels of ``paged_decode``: the plan of a batch, the parts of its contexts, and what adds them up.

Dimensions as there, and: X parts of contexts at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertmesh.kernels.triton_support import block_of, dot


@triton.jit(do_not_specialize=["num_seqs", "num_parts"])
def plan_kernel(
    lengths, entries, first_parts, num_seqs, num_shares, num_short_shares, num_parts,
    SEQS: tl.constexpr, PARTS: tl.constexpr, BLOCK_L: tl.constexpr, LEAST: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Entries: sequence (-1 = nothing to do), first and last + 1 position, parts of the sequence."""
    s_S = tl.arange(0, SEQS)
    length_S = tl.load(lengths + s_S, mask=s_S < num_seqs, other=0).to(tl.int32)
    # Whole steps of the loop over a context, so that only a last part has a ragged end.
    num_positions = tl.sum(length_S, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(num_positions, num_shares), BLOCK_L), 1) * BLOCK_L
    if num_positions <= num_short_shares * BLOCK_L:
        share = BLOCK_L
    share = tl.maximum(share, LEAST)
    parts_S = tl.where(s_S < num_seqs, tl.maximum(tl.cdiv(length_S, share), 1), 0)
    end_S = tl.cumsum(parts_S, 0)
    if tl.program_id(0) == 0:
        tl.store(first_parts + s_S, end_S - parts_S, mask=s_S < num_seqs)
        tl.store(first_parts + num_seqs, tl.sum(parts_S, 0))
    part_X = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
    seq_X = tl.sum((end_S[None, :] <= part_X[:, None]).to(tl.int32), 1)
    is_it_XS = s_S[None, :] == seq_X[:, None]
    parts_X = tl.sum(tl.where(is_it_XS, parts_S[None, :], 0), 1)
    length_X = tl.sum(tl.where(is_it_XS, length_S[None, :], 0), 1)
    first_X = tl.sum(tl.where(s_S[None, :] < seq_X[:, None], parts_S[None, :], 0), 1)
    is_used_X = seq_X < num_seqs
    size_X = tl.cdiv(tl.cdiv(length_X, tl.maximum(parts_X, 1)), BLOCK_L) * BLOCK_L
    start_X = (part_X - first_X) * size_X
    to_X = entries + part_X * ENTRY
    is_part_X = part_X < num_parts
    tl.store(to_X, tl.where(is_used_X, seq_X, -1), mask=is_part_X)
    tl.store(to_X + 1, tl.minimum(start_X, length_X), mask=is_part_X)
    tl.store(to_X + 2, tl.minimum(start_X + size_X, length_X), mask=is_part_X)
    tl.store(to_X + 3, parts_X, mask=is_part_X)


@triton.jit(do_not_specialize=["num_parts"])
def add_parts_kernel(
    first_parts, out, sums, stats, num_parts,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence: the answer from its parts, where there are several."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0)
    seq = tl.program_id(1)
    first = tl.load(first_parts + seq)
    last = tl.load(first_parts + seq + 1)
    if last - first > 1:
        d_D = tl.arange(0, HEAD_DIM)
        top = float("-inf")
        total = 0.0
        acc_D = tl.zeros((HEAD_DIM,), tl.float32)
        for part in range(first, last, AT_ONCE):
            part_X = part + tl.arange(0, AT_ONCE)
            mask_X = part_X < last
            own_X = head // QUERIES * num_parts + part_X
            at_X = stats + own_X * (2 * QUERIES) + head % QUERIES
            top_X = tl.load(at_X, mask=mask_X, other=float("-inf"))
            total_X = tl.load(at_X + QUERIES, mask=mask_X, other=0.0)
            row_X = own_X * QUERIES + head % QUERIES
            sum_XD = tl.load(sums + row_X[:, None] * HEAD_DIM + d_D[None, :], mask=mask_X[:, None], other=0.0)
            new_top = tl.maximum(top, tl.max(top_X, 0))
            factor_X = tl.exp2(top_X - new_top)
            factor = tl.exp2(top - new_top)
            total = total * factor + tl.sum(total_X * factor_X, 0)
            acc_D = acc_D * factor + tl.sum(sum_XD * factor_X[:, None], 0)
            top = new_top
        to_D = out + (seq.to(tl.int64) * tl.num_programs(0) + head) * HEAD_DIM + d_D
        tl.store(to_D, (acc_D / total).to(out.dtype.element_ty))


@triton.jit
def paged_decode_kernel(
    q,
    key,
    value,
    blocks,
    entries,
    out,
    sums,
    stats,
    scale,
    q_stride_s,
    q_stride_h,
    key_stride_b,
    key_stride_p,
    key_stride_k,
    value_stride_b,
    value_stride_p,
    value_stride_k,
    blocks_stride,
    KV_HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    QUERIES_2: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
    LOOKS_AHEAD: tl.constexpr,
    ENTRY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
    PLAN_IS_OLD: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        if not PLAN_IS_OLD:
            tl.extra.cuda.gdc_wait()
    kv_head = tl.program_id(0)
    part = tl.program_id(1)
    entry = entries + part * ENTRY
    seq = tl.load(entry)
    start = tl.load(entry + 1)
    end = tl.load(entry + 2)
    parts = tl.load(entry + 3)
    q_R = tl.arange(0, QUERIES_2)
    d_D = tl.arange(0, HEAD_DIM)
    l_L = tl.arange(0, BLOCK_L)
    is_query_R1 = (q_R < QUERIES)[:, None]
    head_R1 = (kv_head * QUERIES + q_R)[:, None]
    out_RD = out + (seq.to(tl.int64) * KV_HEADS * QUERIES + head_R1) * HEAD_DIM + d_D[None, :]
    table = blocks + tl.maximum(seq, 0).to(tl.int64) * blocks_stride
    key += kv_head * key_stride_k
    value += kv_head * value_stride_k
    top_R = tl.full((QUERIES_2,), float("-inf"), tl.float32)
    total_R = tl.zeros((QUERIES_2,), tl.float32)
    acc_RD = tl.zeros((QUERIES_2, HEAD_DIM), tl.float32)
    block_L = block_of(table, start + l_L, tl.maximum(end, 1), BLOCK_SIZE, WIDENS)
    if OVERLAPS and PLAN_IS_OLD:
        tl.extra.cuda.gdc_wait()
    if start < end:
        q_RD = tl.load(
            q + seq.to(tl.int64) * q_stride_s + head_R1 * q_stride_h + d_D[None, :], mask=is_query_R1, other=0.0
        )
        for first in tl.range(start, end, BLOCK_L, num_stages=STAGES):
            # The tail reads the last position again and gives it no weight: no load needs a mask.
            read_L = tl.minimum(first + l_L, end - 1)
            within_L = read_L % BLOCK_SIZE
            if not LOOKS_AHEAD:
                block_L = tl.load(table + read_L // BLOCK_SIZE).to(tl.int64)
            at_L = block_L * key_stride_b + within_L * key_stride_p
            key_LD = tl.load(key + at_L[:, None] + d_D[None, :])
            at_L = block_L * value_stride_b + within_L * value_stride_p
            value_LD = tl.load(value + at_L[:, None] + d_D[None, :])
            if LOOKS_AHEAD:
                block_L = block_of(table, first + BLOCK_L + l_L, end, BLOCK_SIZE, WIDENS)
            score_RL = dot(q_RD, tl.trans(key_LD), tl.zeros((QUERIES_2, BLOCK_L), tl.float32), PRECISION, WIDENS)
            score_RL = tl.where((first + l_L < end)[None, :], score_RL * scale, float("-inf"))
            new_top_R = tl.maximum(top_R, tl.max(score_RL, 1))
            weight_RL = tl.exp2(score_RL - new_top_R[:, None])
            factor_R = tl.exp2(top_R - new_top_R)
            total_R = total_R * factor_R + tl.sum(weight_RL, 1)
            acc_RD = dot(weight_RL.to(value_LD.dtype), value_LD, acc_RD * factor_R[:, None], PRECISION, WIDENS)
            top_R = new_top_R
        if parts == 1:
            tl.store(out_RD, (acc_RD / total_R[:, None]).to(out.dtype.element_ty), mask=is_query_R1)
    elif seq >= 0:  # a sequence of length 0
        tl.store(out_RD, acc_RD.to(out.dtype.element_ty), mask=is_query_R1)
    if parts > 1:
        own = kv_head * tl.num_programs(1) + part
        tl.store(sums + own * QUERIES * HEAD_DIM + q_R[:, None] * HEAD_DIM + d_D[None, :], acc_RD, mask=is_query_R1)
        tl.store(stats + own * 2 * QUERIES + q_R, top_R, mask=q_R < QUERIES)
        tl.store(stats + own * 2 * QUERIES + QUERIES + q_R, total_R, mask=q_R < QUERIES)
