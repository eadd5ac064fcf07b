"""The grouped expert MLP with weights in float8, scaled by blocks of 128 × 128 (DeepSeek-V3, arXiv 2412.19437, §3.3).

As ``grouped_mlp_gpu``: two launches, no host synchronisation, static shapes. Each block's product is added up in
float32 times its scale. Rows stay in bfloat16, against which weights are widened in registers, or are rounded to float8
too, a scale for 128 features of a row, so that the tensor cores multiply float8 numbers.

Dimensions: S slots, A experts in memory, N rows, H hidden size, I width of an expert, F = 2I (gate first, then up); of
blocks of 128: X = ⌈H/128⌉, Y = ⌈I/128⌉.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.fp8_rows import BLOCK, dequantize_rows_reference, quantize_rows, quantize_rows_reference
from expertmesh.kernels.grouped_mlp_tiles import Tile, Tiles, fp8_tiles_for
from expertmesh.kernels.grouped_tile_place import count_tiles, place_tile, swiglu
from expertmesh.kernels.triton_support import IS_INTERPRETED, dot, num_multiprocessors

SIZE_MULTIPLE = 16
"""Of hidden size and width: the bulk copy engine reads no other rows of float8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Experts:
    """Weights float8_e4m3fn, contiguous; scales float32, which multiply them. Gate and up have scales of their own."""

    gate_up_AFH: torch.Tensor
    down_AHI: torch.Tensor
    gate_up_scale_A2YX: torch.Tensor
    down_scale_AXY: torch.Tensor

    def dequantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(gate_up, down) in float32."""
        gate_up_A2IH = self.gate_up_AFH.unflatten(1, (2, -1))
        gate_up = _times_blocks(gate_up_A2IH, self.gate_up_scale_A2YX).flatten(1, 2)
        return gate_up, _times_blocks(self.down_AHI, self.down_scale_AXY)


def scale_shapes(hidden_size: int, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one expert's scales: gate and up, down."""
    hidden_blocks, width_blocks = triton.cdiv(hidden_size, BLOCK), triton.cdiv(width, BLOCK)
    return (2, width_blocks, hidden_blocks), (hidden_blocks, width_blocks)


def _times_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = weight.shape[-2:]
    wide = scale.repeat_interleave(BLOCK, -1)[..., :columns]
    return weight.float() * wide.repeat_interleave(BLOCK, -2)[..., :rows, :]


def grouped_expert_mlp_fp8_reference(
    rows_NH: torch.Tensor, counts_S: torch.Tensor, experts: Fp8Experts, *, rounds_rows: bool = False
) -> torch.Tensor:
    """``grouped_expert_mlp_fp8`` in plain torch and float32, a loop over slots without gaps."""
    gate_up_AFH, down_AHI = experts.dequantised()
    y_NH, start = torch.zeros_like(rows_NH), 0

    def operand(x_MK: torch.Tensor) -> torch.Tensor:
        if not rounds_rows:
            return x_MK.float()
        padded = F.pad(x_MK, (0, -x_MK.shape[1] % BLOCK))
        end = torch.tensor([len(x_MK)], device=x_MK.device)
        q_MK, scale_MB = quantize_rows_reference(padded)
        return dequantize_rows_reference(q_MK, scale_MB, end).float()[:, : x_MK.shape[1]]

    for slot, count in enumerate(counts_S.tolist()):
        x_MK = rows_NH[start : start + count]
        gate, up = (operand(x_MK) @ gate_up_AFH[slot].T).chunk(2, -1)
        hidden = (F.silu(gate) * up).to(rows_NH.dtype)
        y_NH[start : start + count] = (operand(hidden) @ down_AHI[slot].T).to(rows_NH.dtype)
        start += count
    return y_NH


def grouped_expert_mlp_fp8(
    rows_NH: torch.Tensor,
    counts_S: torch.Tensor,
    experts: Fp8Experts,
    *,
    starts_S: torch.Tensor | None = None,
    table_S: torch.Tensor | None = None,
    factor_N: torch.Tensor | None = None,
    expected_rows: float | None = None,
    rounds_rows: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``down(silu(gate(x)) * up(x))`` of each row with its slot's weights; arguments as ``grouped_expert_mlp_gpu``.

    Args:
        rows_NH: bfloat16, contiguous. H and I are multiples of 16, with ``rounds_rows`` of 128.
        rounds_rows: round what goes into each product to float8.

    Returns:
        y_NH, bfloat16; rows that belong to no slot are left undefined.
    """
    num_rows, num_slots = rows_NH.shape[0], counts_S.shape[0]
    y_NH = torch.empty_like(rows_NH)
    if num_rows == 0:
        return y_NH
    if tiles is None:
        tiles = fp8_tiles_for(num_rows / num_slots if expected_rows is None else expected_rows, rounds_rows)
    hidden_NI = rows_NH.new_empty(num_rows, experts.down_AHI.shape[-1])
    grouped_matmul_fp8(
        rows_NH, counts_S, experts.gate_up_AFH, experts.gate_up_scale_A2YX, hidden_NI, tiles.gate_up,
        is_gated=True, rounds_rows=rounds_rows, starts_S=starts_S, table_S=table_S,
    )  # fmt: skip
    grouped_matmul_fp8(
        hidden_NI, counts_S, experts.down_AHI, experts.down_scale_AXY, y_NH, tiles.down,
        is_gated=False, rounds_rows=rounds_rows, starts_S=starts_S, table_S=table_S, factor_N=factor_N,
    )  # fmt: skip
    return y_NH


def grouped_matmul_fp8(
    x_NK: torch.Tensor,
    counts_S: torch.Tensor,
    weight_ACK: torch.Tensor,
    scale: torch.Tensor,
    out_NC: torch.Tensor,
    tile: Tile,
    *,
    is_gated: bool,
    rounds_rows: bool,
    starts_S: torch.Tensor | None = None,
    table_S: torch.Tensor | None = None,
    factor_N: torch.Tensor | None = None,
) -> None:
    """One of the two products; ``weight`` and ``scale`` as in ``Fp8Experts``.

    ``tile``: depth 128, 128 columns or a part of it, so that a step has one scale.
    """
    assert (tile.depth, BLOCK % tile.columns) == (BLOCK, 0), f"{tile} has several scales a step"
    (num_rows, depth), num_columns = x_NK.shape, out_NC.shape[1]
    num_slots = counts_S.shape[0]
    x_scale_NB = None
    if rounds_rows:
        x_NK, x_scale_NB = quantize_rows(x_NK)
    most_tiles = (num_rows // tile.rows + min(num_slots, num_rows)) * triton.cdiv(num_columns, tile.columns)
    programs = most_tiles
    if tile.programs_per_sm:
        programs = min(most_tiles, tile.programs_per_sm * num_multiprocessors(x_NK.device))
    parts = 2 if is_gated else 1
    weight = weight_ACK.view(-1, num_columns, depth)
    _grouped_matmul_fp8_kernel[(programs,)](
        TensorDescriptor.from_tensor(x_NK, [tile.rows, BLOCK]),
        x_NK if x_scale_NB is None else x_scale_NB,
        TensorDescriptor.from_tensor(weight, [parts, tile.columns, BLOCK]),
        scale,
        out_NC,
        counts_S,
        counts_S if starts_S is None else starts_S,
        counts_S if table_S is None else table_S,
        counts_S if factor_N is None else factor_N,
        num_slots,
        num_rows,
        num_columns,
        depth,
        SLOTS=triton.next_power_of_2(num_slots),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=BLOCK,
        STAGES=tile.stages,
        PARTS=parts,
        HAS_STARTS=starts_S is not None,
        HAS_TABLE=table_S is not None,
        HAS_FACTORS=factor_N is not None,
        ROUNDS_ROWS=rounds_rows,
        LOOPS=tile.programs_per_sm > 0,
        WIDENS=IS_INTERPRETED,
        num_warps=tile.warps,
    )


@triton.jit
def _compute_tile(
    tile,
    x,
    x_scale,
    weight,
    scale,
    out,
    starts,
    factors,
    slot_S,
    count_S,
    blocks_S,
    end_S,
    home_S,
    num_rows,
    num_columns,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ROUNDS_ROWS: tl.constexpr,
    WIDENS: tl.constexpr,
):
    start, count, home, block, column = place_tile(
        tile, starts, slot_S, count_S, blocks_S, end_S, home_S, num_columns, BLOCK_N, HAS_STARTS
    )
    row = start + block * BLOCK_M
    row_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    depth_blocks = tl.cdiv(depth, BLOCK_K)
    # Gate above up where both are multiplied at once: a scale for each half of the columns.
    part_N = tl.arange(0, PARTS * BLOCK_N) // BLOCK_N
    scale_block_N = (home.to(tl.int64) * PARTS + part_N) * tl.cdiv(num_columns, BLOCK_K) + column // BLOCK_K
    scale_N = scale + scale_block_N * depth_blocks
    # A block may reach into the rows of others, and behind the last: what comes of those is not stored.
    x_scale_M = x_scale + tl.minimum(start + row_M, num_rows - 1).to(tl.int64) * depth_blocks
    # A round ahead, so that no round waits for a scale.
    factor_N = tl.load(scale_N)
    if ROUNDS_ROWS:
        factor_M = tl.load(x_scale_M)
    acc_NM = tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32)
    for k in tl.range(0, depth_blocks, num_stages=STAGES):
        x_MK = x.load([row, k * BLOCK_K])
        w_NK = tl.reshape(weight.load([home * PARTS, column, k * BLOCK_K]), (PARTS * BLOCK_N, BLOCK_K))
        if not ROUNDS_ROWS:
            w_NK = w_NK.to(x_MK.dtype)
        product_NM = dot(w_NK, tl.trans(x_MK), tl.zeros((PARTS * BLOCK_N, BLOCK_M), tl.float32), "tf32", WIDENS)
        product_NM *= factor_N[:, None]
        next_k = tl.minimum(k + 1, depth_blocks - 1)
        factor_N = tl.load(scale_N + next_k)
        if ROUNDS_ROWS:
            product_NM *= factor_M[None, :]
            factor_M = tl.load(x_scale_M + next_k)
        acc_NM += product_NM
    dtype = out.dtype.element_ty
    if PARTS == 2:
        gate_NM, up_NM = tl.split(tl.permute(tl.reshape(acc_NM, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
        acc_NM = swiglu(gate_NM, up_NM, dtype)
    if HAS_FACTORS:
        acc_NM *= tl.load(factors + start + row_M, mask=row_M < count, other=0.0)[None, :]
    column_N = column + tl.arange(0, BLOCK_N)
    to = out + (start + row_M).to(tl.int64)[:, None] * num_columns + column_N[None, :]
    tl.store(to, tl.trans(acc_NM.to(dtype)), mask=(row_M < count)[:, None] & (column_N < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_matmul_fp8_kernel(
    x,
    x_scale,
    weight,
    scale,
    out,
    counts,
    starts,
    table,
    factors,
    num_slots,
    num_rows,
    num_columns,
    depth,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ROUNDS_ROWS: tl.constexpr,
    LOOPS: tl.constexpr,
    WIDENS: tl.constexpr,
):
    slot_S, count_S, blocks_S, end_S, home_S, num_tiles = count_tiles(
        counts, table, num_slots, num_columns, SLOTS, BLOCK_M, BLOCK_N, HAS_TABLE
    )
    pid = tl.program_id(0)
    if LOOPS:
        for tile in range(pid, num_tiles, tl.num_programs(0)):
            _compute_tile(
                tile, x, x_scale, weight, scale, out, starts, factors, slot_S, count_S, blocks_S, end_S, home_S,
                num_rows, num_columns, depth, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS, HAS_STARTS, HAS_FACTORS,
                ROUNDS_ROWS, WIDENS,
            )  # fmt: skip
    elif pid < num_tiles:
        _compute_tile(
            pid, x, x_scale, weight, scale, out, starts, factors, slot_S, count_S, blocks_S, end_S, home_S,
            num_rows, num_columns, depth, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, PARTS, HAS_STARTS, HAS_FACTORS,
            ROUNDS_ROWS, WIDENS,
        )  # fmt: skip
