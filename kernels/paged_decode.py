"""Decode attention over a paged KV cache, grouped queries, split over the context (Dao et al. 2023, "Flash-Decoding for
long-context inference").

Dimensions: S sequences, one query token each; H query heads, R of them share one of K KV heads; D head size; B blocks
of P positions in the cache, of which a sequence's table names T; L positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from expertmesh.kernels.paged_decode_kernels import add_parts_kernel, paged_decode_kernel, plan_kernel
from expertmesh.kernels.triton_support import IS_INTERPRETED, OVERLAPPING, OVERLAPS, num_multiprocessors

_LOG2_E = 1.4426950408889634
_LEAST_QUERIES = 16  # rows of the tensor cores' left operand
_ENTRY_INTS = 4  # of a plan's entry
_PLANNED_AT_ONCE = 32
_ADDED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Tuning:
    """``programs_per_sm`` shares of the batch a multiprocessor; a program's positions at a time, warps and stages.

    ``least_tokens``: no context is cut into parts of fewer positions than that. ``looks_ahead``: the cache's blocks are
    looked up a step before they are read, so that no step waits for an address. ``short_programs_per_sm``: shares of a
    batch whose contexts are so short that each of these is no more than one step; 0 = as of any batch.
    """

    programs_per_sm: int
    block_tokens: int
    warps: int
    stages: int
    least_tokens: int = 0
    looks_ahead: bool = True
    short_programs_per_sm: int = 0


TUNINGS: tuple[tuple[float, Tuning], ...] = (
    (32, Tuning(2, 64, 4, 3, short_programs_per_sm=3)),
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
        plan_kernel[(triton.cdiv(num_parts, _PLANNED_AT_ONCE),)](
            lengths_S,
            self.entries,
            self.first_parts,
            num_seqs,
            self.num_shares(num_seqs),
            self.num_short_shares(num_seqs),
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

    def num_short_shares(self, num_seqs: int) -> int:
        """The same where one step is enough for each; 0 = there is no such case."""
        return int(self.tuning(num_seqs).short_programs_per_sm * self._programs_at_once)

    def num_parts(self, num_seqs: int) -> int:
        """The most parts that so many sequences can have: each may have one that is not full."""
        return max(self.num_shares(num_seqs), self.num_short_shares(num_seqs)) + num_seqs


def paged_decode_attention(
    q_SHD: torch.Tensor,
    key_BPKD: torch.Tensor,
    value_BPKD: torch.Tensor,
    blocks_ST: torch.Tensor,
    lengths_S: torch.Tensor,
    *,
    scale: float | None = None,
    plan: DecodePlan | None = None,
    plan_is_old: bool = False,
    out_SHD: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q · keys · scale) · values for one query token a sequence, over its first ``lengths_S`` positions.

    Two launches, no host synchronisation. The second adds up the parts of a context in their order, so results do not
    depend on timing.

    Args:
        q_SHD: bfloat16 or float32, features contiguous; the R heads of a KV head together. D a power of two, at least
            16.
        key_BPKD, value_BPKD: q's dtype, any strides but the last's, 1.
        blocks_ST: int32 or int64, the sequences' block tables, perhaps with others behind them; entries beyond a length
            are not read.
        lengths_S: int32 or int64; 0 = no sequence, whose result is 0.
        scale: default D^-0.5.
        plan: updated with these lengths; None makes one, which costs some launches.
        plan_is_old: plan and block tables were there before a launch that does not overlap (see ``triton_support``):
            then they are read while the launch before this one is still at work.
        out_SHD: q's dtype, contiguous, to be written to.

    Returns:
        out_SHD in q's dtype.
    """
    num_seqs, num_heads, head_dim = q_SHD.shape
    block_size, num_kv_heads = key_BPKD.shape[1:3]
    if out_SHD is None:
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
    paged_decode_kernel[(num_kv_heads, plan.num_parts(num_seqs))](
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
        OVERLAPS=OVERLAPS,
        PLAN_IS_OLD=plan_is_old,
        num_warps=tuning.warps,
        **OVERLAPPING,
    )
    # Its programs are in place when the last part is done (programmatic dependent launch).
    add_parts_kernel[(num_heads, num_seqs)](
        plan.first_parts,
        out_SHD,
        plan.sums,
        plan.stats,
        plan.num_parts(num_seqs),
        QUERIES=queries,
        HEAD_DIM=head_dim,
        AT_ONCE=_ADDED_AT_ONCE,
        OVERLAPS=OVERLAPS,
        num_warps=2,
        **OVERLAPPING,
    )
    return out_SHD
