"""The grouped expert MLPs against their references, on any device; see ``kernel_checks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertmesh.kernels.grouped_mlp_fp8 import (
    Fp8Experts,
    grouped_expert_mlp_fp8,
    grouped_expert_mlp_fp8_reference,
    scale_shapes,
)
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.kernels.grouped_mlp_tiles import Tiles
from support.kernel_draws import Draw, assert_near, poisoned


def expert_mlp_reference(
    rows_NH: torch.Tensor, counts: Sequence[int], starts: Sequence[int], gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A float64 loop over slots; rows of no slot are 0."""
    y_NH = torch.zeros_like(rows_NH, dtype=torch.float64)
    for slot, (count, start) in enumerate(zip(counts, starts, strict=True)):
        rows = slice(start, start + count)
        gate, up = (rows_NH[rows].double() @ gate_up[slot].double().T).chunk(2, dim=-1)
        y_NH[rows] = (torch.nn.functional.silu(gate) * up) @ down[slot].double().T
    return y_NH


def check_grouped_mlp(
    device: str,
    counts: Sequence[int],
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
    gap: int = 0,
    spare: int = 0,
    has_factors: bool = False,
) -> None:
    """``gap`` rows between slots and ``spare`` rows at the end belong to nobody and hold NaN."""
    draw = Draw(sum(counts) * 1000 + hidden + width, device)
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += count + gap
    rows_NH = draw.normal(end + spare, hidden, dtype=dtype)
    is_used_N = torch.zeros(end + spare, dtype=torch.bool, device=device)
    for count, start in zip(counts, starts, strict=True):
        is_used_N[start : start + count] = True
    rows_NH[~is_used_N] = float("nan")
    gate_up_SFH = (draw.normal(len(counts), 2 * width, hidden) / hidden**0.5).to(dtype)
    down_SHI = (draw.normal(len(counts), hidden, width) / width**0.5).to(dtype)
    factor_N = draw.normal(end + spare).masked_fill(~is_used_N, float("nan")) if has_factors else None
    with poisoned():
        y_NH = grouped_expert_mlp_gpu(
            rows_NH,
            torch.tensor(counts, device=device),
            gate_up_SFH,
            down_SHI,
            starts_S=torch.tensor(starts, device=device, dtype=torch.int32) if gap else None,
            factor_N=factor_N,
            tiles=tiles,
        )
    assert y_NH.dtype == dtype
    expected_NH = expert_mlp_reference(rows_NH, counts, starts, gate_up_SFH, down_SHI)
    if factor_N is not None:
        expected_NH = (expected_NH.float() * factor_N[:, None]).to(dtype)
    assert_near(y_NH[is_used_N], expected_NH[is_used_N], dtype)


def fp8_experts(draw: Draw, num_experts: int, hidden: int, width: int) -> Fp8Experts:
    """Drawn at random; scales of neighbouring blocks differ by up to a factor of four."""
    gate_up_scale, down_scale = (
        (0.25 + 0.75 * torch.rand(num_experts, *shape, generator=draw.generator, device=draw.device)) / depth**0.5
        for shape, depth in zip(scale_shapes(hidden, width), (hidden, width), strict=True)
    )
    return Fp8Experts(
        gate_up_AFH=draw.normal(num_experts, 2 * width, hidden, dtype=torch.float8_e4m3fn),
        down_AHI=draw.normal(num_experts, hidden, width, dtype=torch.float8_e4m3fn),
        gate_up_scale_A2YX=gate_up_scale,
        down_scale_AXY=down_scale,
    )


def check_grouped_mlp_fp8(
    device: str,
    counts: Sequence[int],
    hidden: int,
    width: int,
    *,
    rounds_rows: bool,
    tiles: Tiles | None = None,
    gap: int = 0,
    spare: int = 0,
    has_factors: bool = False,
) -> None:
    """Slots behind a table, the last expert's weights first; ``gap`` and ``spare`` as in ``check_grouped_mlp``."""
    draw, num_slots = Draw(sum(counts) + hidden + width, device), len(counts)
    experts = fp8_experts(draw, num_slots, hidden, width)
    table_S = torch.arange(num_slots - 1, -1, -1, dtype=torch.int32, device=device)
    turned = Fp8Experts(
        gate_up_AFH=experts.gate_up_AFH.view(torch.uint8).flip(0).view(torch.float8_e4m3fn),
        down_AHI=experts.down_AHI.view(torch.uint8).flip(0).view(torch.float8_e4m3fn),
        gate_up_scale_A2YX=experts.gate_up_scale_A2YX.flip(0),
        down_scale_AXY=experts.down_scale_AXY.flip(0),
    )
    counts_S = torch.tensor(counts, device=device)
    starts_S = counts_S.cumsum(0) - counts_S + gap * torch.arange(num_slots, device=device)
    place_N = torch.cat([torch.arange(s, s + c) for s, c in zip(starts_S.tolist(), counts, strict=True)]).to(device)
    dense_NH = draw.normal(sum(counts), hidden, dtype=torch.bfloat16)
    rows_NH = torch.full((sum(counts) + gap * num_slots + spare, hidden), float("nan"), device=device).bfloat16()
    rows_NH[place_N] = dense_NH
    factor_N = draw.normal(len(rows_NH)) if has_factors else None
    with poisoned():
        y_NH = grouped_expert_mlp_fp8(
            rows_NH,
            counts_S,
            turned,
            starts_S=starts_S.int() if gap else None,
            table_S=table_S,
            factor_N=factor_N,
            rounds_rows=rounds_rows,
            tiles=tiles,
        )
    expected_NH = grouped_expert_mlp_fp8_reference(dense_NH, counts_S, experts, rounds_rows=rounds_rows).float()
    if factor_N is not None:
        expected_NH *= factor_N[place_N][:, None]
    # Roundings to 3 bits fall to the other side now and then, in the interpreter more often: see check_fp8_rows.
    assert_near(y_NH[place_N], expected_NH, torch.bfloat16, slack=4 if rounds_rows else 1)
