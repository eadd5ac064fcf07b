"""Decode attention over a paged KV cache, grouped queries, split over the context (Dao et al. 2023, "Flash-Decoding for
long-context inference").

Dimensions: S sequences, one query token each; H query heads, R of them share one of K KV heads; D head size; B blocks
of P positions in the cache, of which a sequence's table names T; L positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import IS_INTERPRETED, block_of, dot, num_multiprocessors

_LOG2_E = 1.4426950408889634
_LEAST_QUERIES = 16  # rows of the tensor cores' left operand
_ENTRY_INTS = 4  # of a plan's entry
_PLANNED_AT_ONCE = 32
_ADDED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Tuning:
    """``programs_per_sm`` shares of the batch a multiprocessor; a program's positions at a time, warps and stages.

    ``least_tokens``: no context is cut into parts of fewer positions than that. ``looks_ahead``: the cache's blocks are
    looked up a step before they are read, so that no step waits for an address.
    """

    programs_per_sm: int
    block_tokens: int
    warps: int
    stages: int
    least_tokens: int = 0
    looks_ahead: bool = True


TUNINGS: tuple[tuple[float, Tuning], ...] = (
    (16, Tuning(2, 64, 4, 3)),
    (128, Tuning(3, 64, 2, 2, least_tokens=256)),
    (float("inf"), Tuning(2, 128, 4, 2, looks_ahead=False)),
)
"""For up to so many sequences. Measured by ``benchmarks/gpu/kernels.py --sweep``: more parts than run at once even out
contexts of unequal lengths; many contexts are read fastest in large steps."""


def paged_decode_attention_reference(
    q_SHD: torch.Tensor,
    key_BPKD: torch.Tensor,
    value_BPKD: torch.Tensor,
    blocks_ST: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """``paged_decode_attention`` in plain torch and float32, a loop over sequences."""
    block_size, num_kv_heads = key_BPKD.shape[1:3]
    num_heads, head_dim = q_SHD.shape[1:]
    scale = head_dim**-0.5 if scale is None else scale
    out_SHD = torch.zeros_like(q_SHD)
    for s, length in enumerate(lengths_S.tolist()):
        if not length:
            continue
        blocks = blocks_ST[s, : -(-length // block_size)].long()
        key_LKD, value_LKD = (
            cache[blocks].float().reshape(-1, num_kv_heads, head_dim)[:length] for cache in (key_BPKD, value_BPKD)
        )
        q_KRD = q_SHD[s].float().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
        weight_KRL = torch.einsum("krd,lkd->krl", q_KRD, key_LKD).mul(scale).softmax(-1)
        out_SHD[s] = torch.einsum("krl,lkd->krd", weight_KRL, value_LKD).reshape(num_heads, head_dim)
    return out_SHD


class DecodePlan:
    """Which programs read which part of which context, and memory for their results; made on the device, once a step.

    Contexts are cut so that no part is longer than a fair share of the batch's tokens: long contexts get more parts
    than short ones, and all programs take about equally long. A plan serves all layers of a step on one stream.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        tuning: Tuning | None = None,
    ) -> None:
        """For batches of up to ``max_seqs`` sequences. ``tuning``: for every batch; the default is the measured one."""
        self.max_seqs = max_seqs
        self._tuning = tuning
        self._programs_at_once = num_multiprocessors(device) / num_kv_heads
        queries = num_heads // num_kv_heads
        batches = [max_seqs, *(int(most) for most, _ in TUNINGS if most < max_seqs)]
        num_parts = max(self.num_parts(num_seqs) for num_seqs in batches)
        self.entries = torch.empty(num_parts, _ENTRY_INTS, dtype=torch.int32, device=device)
        self.sums = torch.empty(num_kv_heads * num_parts, queries, head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(num_kv_heads * num_parts, 2, queries, dtype=torch.float32, device=device)
        # The first part of each sequence, and one behind the last's last.
        self.first_parts = torch.empty(max_seqs + 1, dtype=torch.int32, device=device)

    def update(self, lengths_S: torch.Tensor) -> None:
        """Plan for these lengths, int32 or int64 [S], S ≤ ``max_seqs``; one launch, no host synchronisation."""
        num_seqs = len(lengths_S)
        assert num_seqs <= self.max_seqs, f"a plan for {self.max_seqs} sequences, not {num_seqs}"
        num_parts = self.num_parts(num_seqs)
        _plan_kernel[(triton.cdiv(num_parts, _PLANNED_AT_ONCE),)](
            lengths_S,
            self.entries,
            self.first_parts,
            num_seqs,
            self.num_shares(num_seqs),
            num_parts,
            SEQS=triton.next_power_of_2(self.max_seqs),  # one kernel for all batches
            PARTS=_PLANNED_AT_ONCE,
            BLOCK_L=self.tuning(num_seqs).block_tokens,
            LEAST=self.tuning(num_seqs).least_tokens,
            ENTRY=_ENTRY_INTS,
            num_warps=4,
        )

    def tuning(self, num_seqs: int) -> Tuning:
        """Of a batch of so many sequences."""
        return self._tuning or next(tuning for most, tuning in TUNINGS if num_seqs <= most)

    def num_shares(self, num_seqs: int) -> int:
        """Parts that the batch's tokens are cut into, if all contexts fill theirs."""
        return max(1, int(self.tuning(num_seqs).programs_per_sm * self._programs_at_once))

    def num_parts(self, num_seqs: int) -> int:
        """The most parts that so many sequences can have: each may have one that is not full."""
        return self.num_shares(num_seqs) + num_seqs


def paged_decode_attention(
    q_SHD: torch.Tensor,
    key_BPKD: torch.Tensor,
    value_BPKD: torch.Tensor,
    blocks_ST: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    scale: float | None = None,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """softmax(q · keys · scale) · values for one query token a sequence, over its first ``lengths_S`` positions.

    Two launches, no host synchronisation. The second adds up the parts of a context in their order, so results do not
    depend on timing.

    Args:
        q_SHD: bfloat16 or float32, features contiguous; the R heads of a KV head together. D a power of two, at least
            16.
        key_BPKD, value_BPKD: q's dtype, any strides but the last's, 1.
        blocks_ST: int32 or int64, the sequences' block tables; entries beyond a length are not read.
        lengths_S: int32 or int64; 0 = no sequence, whose result is 0.
        scale: default D^-0.5.
        plan: updated with these lengths; None makes one, which costs some launches.

    Returns:
        out_SHD in q's dtype.
    """
    num_seqs, num_heads, head_dim = q_SHD.shape
    block_size, num_kv_heads = key_BPKD.shape[1:3]
    out_SHD = torch.empty(num_seqs, num_heads, head_dim, dtype=q_SHD.dtype, device=q_SHD.device)
    if num_seqs == 0:
        return out_SHD
    if plan is None:
        plan = DecodePlan(
            max_seqs=num_seqs,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            device=q_SHD.device,
        )
        plan.update(lengths_S)
    queries, tuning = num_heads // num_kv_heads, plan.tuning(num_seqs)
    _paged_decode_kernel[(num_kv_heads, plan.num_parts(num_seqs))](
        q_SHD,
        key_BPKD,
        value_BPKD,
        blocks_ST,
        plan.entries,
        out_SHD,
        plan.sums,
        plan.stats,
        (head_dim**-0.5 if scale is None else scale) * _LOG2_E,
        *q_SHD.stride()[:2],
        *key_BPKD.stride()[:3],
        *value_BPKD.stride()[:3],
        blocks_ST.stride(0),
        KV_HEADS=num_kv_heads,
        QUERIES=queries,
        QUERIES_2=max(_LEAST_QUERIES, triton.next_power_of_2(queries)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_L=tuning.block_tokens,
        STAGES=tuning.stages,
        LOOKS_AHEAD=tuning.looks_ahead,
        ENTRY=_ENTRY_INTS,
        PRECISION="ieee" if q_SHD.dtype == torch.float32 else "tf32",
        WIDENS=IS_INTERPRETED,
        SIGNALS=not IS_INTERPRETED,
        num_warps=tuning.warps,
    )
    # Its programs are in place when the last part is done (programmatic dependent launch).
    _add_parts_kernel[(num_heads, num_seqs)](
        plan.first_parts,
        out_SHD,
        plan.sums,
        plan.stats,
        plan.num_parts(num_seqs),
        QUERIES=queries,
        HEAD_DIM=head_dim,
        AT_ONCE=_ADDED_AT_ONCE,
        OVERLAPS=not IS_INTERPRETED,
        num_warps=2,
        **({} if IS_INTERPRETED else {"launch_pdl": True}),
    )
    return out_SHD


@triton.jit(do_not_specialize=["num_seqs", "num_parts"])
def _plan_kernel(
    lengths, entries, first_parts, num_seqs, num_shares, num_parts,
    SEQS: tl.constexpr, PARTS: tl.constexpr, BLOCK_L: tl.constexpr, LEAST: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Entries: sequence (-1 = nothing to do), first and last + 1 position, parts of the sequence."""
    s_S = tl.arange(0, SEQS)
    length_S = tl.load(lengths + s_S, mask=s_S < num_seqs, other=0).to(tl.int32)
    # Whole steps of the loop over a context, so that only a last part has a ragged end.
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(length_S, 0), num_shares), BLOCK_L), 1) * BLOCK_L
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
def _add_parts_kernel(
    first_parts, out, sums, stats, num_parts,
    QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One query head of one sequence: the answer from its parts, where there are several."""
    if OVERLAPS:
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
def _paged_decode_kernel(
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
    SIGNALS: tl.constexpr,
):
    if SIGNALS:
        tl.extra.cuda.gdc_launch_dependents()
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
    table = blocks + seq.to(tl.int64) * blocks_stride
    key += kv_head * key_stride_k
    value += kv_head * value_stride_k
    top_R = tl.full((QUERIES_2,), float("-inf"), tl.float32)
    total_R = tl.zeros((QUERIES_2,), tl.float32)
    acc_RD = tl.zeros((QUERIES_2, HEAD_DIM), tl.float32)
    if start < end:
        q_RD = tl.load(
            q + seq.to(tl.int64) * q_stride_s + head_R1 * q_stride_h + d_D[None, :], mask=is_query_R1, other=0.0
        )
        block_L = block_of(table, start + l_L, end, BLOCK_SIZE, WIDENS)
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
