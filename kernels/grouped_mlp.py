"""The expert MLP over rows grouped by slot: one call for all slots of a layer, no Python loop over experts.

Dimensions: S slots, N rows, H hidden size, I width of an expert, F = 2I (gate first, then up), C rows of the
fullest slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from expertmesh.kernels.host_mlp import host_expert_mlp

GROUPED_MM_ALIGNMENT_BYTES = 16
"""grouped_mm refuses matrices whose rows do not start at multiples of it."""

PADDED_MAX_WORK = 2**24
"""On the CPU, bfloat16 grouped_mm pays some 30 µs a group: while S·C·I·H is no more than this, the padded bmm is faster
(3 × at 16 rows of 11 slots with H = 256, I = 56; even at 1000 rows). With large experts it never is."""

HOST_ROWS, HOST_ROWS_SMALL, HOST_SMALL_BYTES = 4, 32, 2**20
"""Up to so many rows a slot the compiled kernel is faster on the CPU: it reads a weight once for four rows, which costs
little while a slot's weights stay in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertKind:
    """What a family's experts have beside two matrices; as ``mesh.model.architecture.ExpertVariant``.

    With a ``limit``, in place of silu(gate) · up: (up' + 1) · gate' · σ(alpha · gate'), gate' at most the limit and up'
    within ± the limit. ``gate_up_bias_SF`` and ``down_bias_SH``: each slot's, or None.
    """

    limit: float | None = None
    alpha: float = 1.0
    gate_up_bias_SF: torch.Tensor | None = None
    down_bias_SH: torch.Tensor | None = None


def variant_expert_mlp(
    rows_NH: torch.Tensor,
    counts_S: torch.Tensor,
    gate_up_SFH: torch.Tensor,
    down_SHI: torch.Tensor,
    kind: ExpertKind,
) -> torch.Tensor:
    """As ``grouped_expert_mlp`` for experts of another kind, in plain torch."""
    if _needs_padding(rows_NH, down_SHI.shape[-1]) or _padding_pays(rows_NH, counts_S, down_SHI):
        return _padded_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI, kind)
    counts_S = counts_S.to(rows_NH.device)
    offsets_S = counts_S.cumsum(0, dtype=torch.int32)

    def add_bias(out_NO: torch.Tensor, bias_SO: torch.Tensor | None) -> torch.Tensor:
        if bias_SO is None:
            return out_NO
        return out_NO.add_(bias_SO.repeat_interleave(counts_S, dim=0, output_size=len(rows_NH)))

    hidden_NF = F.grouped_mm(rows_NH, gate_up_SFH.transpose(1, 2), offs=offsets_S)
    gated_NI = activate(add_bias(hidden_NF, kind.gate_up_bias_SF), kind)
    return add_bias(F.grouped_mm(gated_NI, down_SHI.transpose(1, 2), offs=offsets_S), kind.down_bias_SH)


def grouped_expert_mlp(
    rows_NH: torch.Tensor, counts_S: torch.Tensor, gate_up_SFH: torch.Tensor, down_SHI: torch.Tensor
) -> torch.Tensor:
    """``down(silu(gate(x)) * up(x))`` for each row with its slot's weights.

    The first ``counts_S[0]`` rows belong to slot 0, the next ``counts_S[1]`` to slot 1, and so on; the counts sum to
    N. A count may be 0, and so may N. float32 and bfloat16; as in transformers, matrix products round to that dtype.
    On a GPU ``grouped_mlp_gpu`` does it, which takes more: buffers with room, gaps between slots.

    A row's result does not depend on the other rows' values. It may differ in the last bits with their number, because
    the matrix product picks its summation order by the number of rows.

    Args:
        rows_NH: the rows, contiguous.
        counts_S: int32 or int64 on the rows' device; the host reads it only where rows get padded, on the CPU.
        gate_up_SFH: weights, contiguous.
        down_SHI: weights, contiguous.

    Returns:
        y_NH in the rows' dtype.
    """
    if _few_rows(rows_NH, gate_up_SFH):
        y_NH = torch.empty_like(rows_NH)
        host_expert_mlp(rows_NH.numpy(), counts_S.numpy(), gate_up_SFH.numpy(), down_SHI.numpy(), y_NH.numpy())
        return y_NH
    if rows_NH.is_cuda:
        # Imported here: Triton is there only where a GPU is.
        from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu

        return grouped_expert_mlp_gpu(rows_NH, counts_S, gate_up_SFH, down_SHI)
    if _needs_padding(rows_NH, down_SHI.shape[-1]) or _padding_pays(rows_NH, counts_S, down_SHI):
        return _padded_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)
    return library_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)


def library_expert_mlp(
    rows_NH: torch.Tensor, counts_S: torch.Tensor, gate_up_SFH: torch.Tensor, down_SHI: torch.Tensor
) -> torch.Tensor:
    """The same through torch's grouped matrix product, whose rows must start at multiples of 16 bytes.

    On a GPU nothing is synchronised; N may exceed the sum of the counts, and rows beyond it are left undefined.
    """
    offsets_S = counts_S.cumsum(0, dtype=torch.int32)
    hidden_NF = F.grouped_mm(rows_NH, gate_up_SFH.transpose(1, 2), offs=offsets_S)
    return F.grouped_mm(_swiglu(hidden_NF), down_SHI.transpose(1, 2), offs=offsets_S)


def _few_rows(rows_NH: torch.Tensor, gate_up_SFH: torch.Tensor) -> bool:
    if not rows_NH.is_cpu or rows_NH.dtype != torch.float32:
        return False
    is_small = gate_up_SFH[0].nbytes <= HOST_SMALL_BYTES
    return rows_NH.shape[0] <= gate_up_SFH.shape[0] * (HOST_ROWS_SMALL if is_small else HOST_ROWS)


def _needs_padding(rows_NH: torch.Tensor, expert_width: int) -> bool:
    return any(size * rows_NH.itemsize % GROUPED_MM_ALIGNMENT_BYTES != 0 for size in (rows_NH.shape[-1], expert_width))


def _padding_pays(rows_NH: torch.Tensor, counts_S: torch.Tensor, down_SHI: torch.Tensor) -> bool:
    if not rows_NH.is_cpu or rows_NH.dtype != torch.bfloat16:
        return False
    return down_SHI.numel() * int(counts_S.max()) <= PADDED_MAX_WORK


def _padded_expert_mlp(
    rows_NH: torch.Tensor,
    counts_S: torch.Tensor,
    gate_up_SFH: torch.Tensor,
    down_SHI: torch.Tensor,
    kind: ExpertKind = ExpertKind(),
) -> torch.Tensor:
    """The same through batched matrix products over [S, C, H], each slot padded with zero rows to C."""
    num_rows, hidden_size = rows_NH.shape
    if num_rows == 0:
        return torch.empty_like(rows_NH)
    num_slots = counts_S.shape[0]
    fullest = int(counts_S.max())
    counts_S = counts_S.to(rows_NH.device)
    # Row n of slot s goes to s·C + (n − rows before s) = n + padding rows before s.
    padding_before_S = torch.arange(num_slots, device=rows_NH.device) * fullest - (counts_S.cumsum(0) - counts_S)
    place_N = torch.arange(num_rows, device=rows_NH.device) + padding_before_S.repeat_interleave(
        counts_S, output_size=num_rows
    )
    padded_PH = rows_NH.new_zeros(num_slots * fullest, hidden_size).index_copy_(0, place_N, rows_NH)
    hidden_SCF = torch.bmm(padded_PH.view(num_slots, fullest, hidden_size), gate_up_SFH.transpose(1, 2))
    if kind.gate_up_bias_SF is not None:
        hidden_SCF += kind.gate_up_bias_SF[:, None]
    y_SCH = torch.bmm(activate(hidden_SCF, kind), down_SHI.transpose(1, 2))
    if kind.down_bias_SH is not None:
        y_SCH += kind.down_bias_SH[:, None]
    return y_SCH.view(-1, hidden_size).index_select(0, place_N)


def activate(gate_up: torch.Tensor, kind: ExpertKind) -> torch.Tensor:
    """[..., 2I] → [..., I], gate first."""
    if kind.limit is None:
        return _swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=kind.limit)
    up = up.clamp(-kind.limit, kind.limit)
    return (up + 1) * (gate * torch.sigmoid(gate * kind.alpha))


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
