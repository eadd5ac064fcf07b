"""The grouped expert MLP on a GPU: two Triton launches, no host synchronisation, static shapes.

Dimensions: S slots, N rows of the buffer, H hidden size, I width of an expert, F = 2I (gate first, then up). A *tile*
is a block of a slot's rows times a block of output columns. Which tiles there are depends on the counts, which only
the device knows: every program derives its tiles from them, and the grid covers the most that N rows can need.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.grouped_mlp_tiles import ODD, Tile, Tiles, tiles_for
from expertmesh.kernels.grouped_tile_place import count_tiles, place_tile, swiglu
from expertmesh.kernels.triton_support import (
    IS_INTERPRETED,
    OVERLAPPING,
    OVERLAPS,
    dot,
    num_multiprocessors,
    prefetch_rows,
)

BULK_COPY_ALIGNMENT_BYTES = 16


def grouped_expert_mlp_gpu(
    rows_NH: torch.Tensor,
    counts_S: torch.Tensor,
    gate_up_SFH: torch.Tensor,
    down_SHI: torch.Tensor,
    *,
    starts_S: torch.Tensor | None = None,
    table_S: torch.Tensor | None = None,
    factor_N: torch.Tensor | None = None,
    expected_rows: float | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """``down(silu(gate(x)) * up(x))`` of each row with its slot's weights; see ``grouped_mlp.grouped_expert_mlp``.

    Safe to capture into a CUDA graph: the counts are read on the device alone. Deterministic: with the same tiles,
    which follow from N/S or ``expected_rows``, a row's result does not depend on the other rows.

    Args:
        rows_NH: bfloat16 or float32, contiguous. Rows that belong to no slot may hold anything.
        counts_S: int32 or int64 on the device.
        gate_up_SFH, down_SHI: contiguous, the rows' dtype.
        starts_S: int32 or int64 on the device, each slot's first row; None = slots follow each other without gaps.
        table_S: int32 on the device, where in ``gate_up`` and ``down``, which may then hold more, each slot's weights
            are; None = the weights of slot s are at s.
        factor_N: float32 on the device, multiplies each row of the result before it is rounded; None = 1.
        expected_rows: mean rows a slot to choose tiles for, where N is a capacity and not what will come; default N/S.
        tiles: instead of the table's.

    Returns:
        y_NH; rows that belong to no slot are left undefined.
    """
    num_rows, num_slots = rows_NH.shape[0], counts_S.shape[0]
    y_NH = torch.empty_like(rows_NH)
    if num_rows == 0:
        return y_NH
    if tiles is None:
        tiles = tiles_for(num_rows / num_slots if expected_rows is None else expected_rows)
    hidden_NI = rows_NH.new_empty(num_rows, down_SHI.shape[-1])
    overlaps = tiles.overlap and OVERLAPS
    product = partial(grouped_matmul, starts_S=starts_S, table_S=table_S)
    product(rows_NH, counts_S, gate_up_SFH, hidden_NI, tiles.gate_up, is_gated=True, signals=overlaps, follows=True)
    product(hidden_NI, counts_S, down_SHI, y_NH, tiles.down, is_gated=False, factor_N=factor_N, waits=overlaps)
    return y_NH


def grouped_matmul(
    x_NK: torch.Tensor,
    counts_S: torch.Tensor,
    weight_SCK: torch.Tensor,
    out_NC: torch.Tensor,
    tile: Tile,
    *,
    is_gated: bool,
    starts_S: torch.Tensor | None = None,
    table_S: torch.Tensor | None = None,
    factor_N: torch.Tensor | None = None,
    signals: bool = False,
    waits: bool = False,
    follows: bool = False,
) -> None:
    """One of the two products: out = x @ weightᵀ of each row's slot, or SwiGLU of it where ``is_gated``.

    Args:
        x_NK, weight_SCK, out_NC: K is the depth; ``weight`` has 2C columns where ``is_gated``.
        factor_N: multiplies each row of ``out`` before it is rounded; not where ``is_gated``.
        signals: let the next launch begin when the last program of this one has begun (programmatic dependent launch).
        waits: the other side: read weights into the L2 cache at once, and rows when the launch before is complete.
        follows: begin while the launch before is at work, and wait for it before anything else.
    """
    assert factor_N is None or not is_gated, "factors are for the rows of the last product"
    num_rows, depth = x_NK.shape
    num_slots, num_columns = counts_S.shape[0], out_NC.shape[1]
    if not _is_bulk(x_NK):
        tile = ODD
    column_blocks = triton.cdiv(num_columns, tile.columns)
    # A slot's last block of rows may be partly empty: one more block for each slot that can have rows at all.
    most_tiles = (num_rows // tile.rows + min(num_slots, num_rows)) * column_blocks
    programs = most_tiles
    if tile.programs_per_sm:
        programs = min(most_tiles, tile.programs_per_sm * num_multiprocessors(x_NK.device))
    weight_RK = weight_SCK.view(-1, depth)
    x, weight = x_NK, weight_RK
    if tile.bulk:
        x = TensorDescriptor.from_tensor(x_NK, [tile.rows, tile.depth])
        weight = TensorDescriptor.from_tensor(weight_RK, [tile.columns, tile.depth])
        if tile.is_paired and is_gated:
            weight = TensorDescriptor.from_tensor(
                weight_SCK.view(-1, num_columns, depth), [2, tile.columns, tile.depth]
            )
    _grouped_matmul_kernel[(programs,)](
        x,
        weight,
        weight_RK,
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
        BLOCK_K=tile.depth,
        STAGES=tile.stages,
        IS_GATED=is_gated,
        HAS_STARTS=starts_S is not None,
        HAS_TABLE=table_S is not None,
        HAS_FACTORS=factor_N is not None,
        WEIGHTS_FIRST=tile.weights_first,
        LOOPS=tile.programs_per_sm > 0,
        FLATTENS=tile.flattens and not IS_INTERPRETED,
        IS_BULK=tile.bulk,
        IS_PAIRED=tile.is_paired and is_gated,
        PRECISION="ieee" if x_NK.dtype == torch.float32 else "tf32",
        WIDENS=IS_INTERPRETED,
        SIGNALS=signals,
        WAITS=waits,
        FOLLOWS=follows and OVERLAPS,
        num_warps=tile.warps,
        **(OVERLAPPING if waits or follows else {}),
    )


def _is_bulk(matrix: torch.Tensor) -> bool:
    """The bulk copy engine reads it, and tensor cores keep its precision."""
    return matrix.dtype == torch.bfloat16 and matrix.shape[-1] * matrix.itemsize % BULK_COPY_ALIGNMENT_BYTES == 0


@triton.jit
def _load_x(x, row, k, num_rows, depth, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, IS_BULK: tl.constexpr):
    if IS_BULK:
        return x.load([row, k])
    else:  # the compiler drops a branch not taken, but not what follows it
        row_M = row + tl.arange(0, BLOCK_M)
        k_K = k + tl.arange(0, BLOCK_K)
        mask = (row_M < num_rows)[:, None] & (k_K < depth)[None, :]
        return tl.load(x + row_M.to(tl.int64)[:, None] * depth + k_K[None, :], mask=mask, other=0.0)


@triton.jit
def _load_weight(weight, row, left, k, depth, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_BULK: tl.constexpr):
    if IS_BULK:
        return weight.load([row, k])
    else:
        column_N = tl.arange(0, BLOCK_N)
        k_K = k + tl.arange(0, BLOCK_K)
        mask = (column_N < left)[:, None] & (k_K < depth)[None, :]
        return tl.load(weight + (row + column_N).to(tl.int64)[:, None] * depth + k_K[None, :], mask=mask, other=0.0)


@triton.jit
def _multiply(x, weight, acc, WEIGHTS_FIRST: tl.constexpr, PRECISION: tl.constexpr, WIDENS: tl.constexpr):
    if WEIGHTS_FIRST:
        return dot(weight, tl.trans(x), acc, PRECISION, WIDENS)
    else:
        return dot(x, tl.trans(weight), acc, PRECISION, WIDENS)


@triton.jit
def _compute_tile(
    tile,
    x,
    weight,
    weight_RK,
    out,
    starts,
    factors,
    count_S,
    blocks_S,
    end_S,
    slot_S,
    home_S,
    num_rows,
    num_columns,
    depth,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    IS_BULK: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    WAITS: tl.constexpr,
):
    start, count, home, block, column = place_tile(
        tile, starts, slot_S, count_S, blocks_S, end_S, home_S, num_columns, BLOCK_N, HAS_STARTS
    )
    row = start + block * BLOCK_M
    if IS_GATED:
        weight_row = home * (2 * num_columns) + column
    else:
        weight_row = home * num_columns + column
    if IS_PAIRED:
        acc = tl.zeros((2 * BLOCK_N, BLOCK_M), tl.float32)
    elif WEIGHTS_FIRST:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    left = num_columns - column
    if WAITS:
        prefetch_rows(weight_RK, weight_row, left, 0, depth, BLOCK_N, 2 * BLOCK_K)
        tl.extra.cuda.gdc_wait()
    # A block may reach into the rows or columns of others: what comes of those is not stored.
    for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        x_MK = _load_x(x, row, k, num_rows, depth, BLOCK_M, BLOCK_K, IS_BULK)
        if IS_PAIRED:
            w_NK = tl.reshape(weight.load([2 * home, column, k]), (2 * BLOCK_N, BLOCK_K))
        else:
            w_NK = _load_weight(weight, weight_row, left, k, depth, BLOCK_N, BLOCK_K, IS_BULK)
        acc = _multiply(x_MK, w_NK, acc, WEIGHTS_FIRST, PRECISION, WIDENS)
        if IS_GATED and not IS_PAIRED:
            up_NK = _load_weight(weight, weight_row + num_columns, left, k, depth, BLOCK_N, BLOCK_K, IS_BULK)
            acc_up = _multiply(x_MK, up_NK, acc_up, WEIGHTS_FIRST, PRECISION, WIDENS)
    dtype = out.dtype.element_ty
    if IS_PAIRED:
        acc, acc_up = tl.split(tl.permute(tl.reshape(acc, (2, BLOCK_N, BLOCK_M)), (1, 2, 0)))
    if IS_GATED:
        acc = swiglu(acc, acc_up, dtype)
    row_M = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if HAS_FACTORS:
        factor_M = tl.load(factors + start + row_M, mask=row_M < count, other=0.0)
        if WEIGHTS_FIRST:
            acc = acc * factor_M[None, :]
        else:
            acc = acc * factor_M[:, None]
    result = acc.to(dtype)
    if WEIGHTS_FIRST:
        result = tl.trans(result)
    column_N = column + tl.arange(0, BLOCK_N)
    to = out + (start + row_M).to(tl.int64)[:, None] * num_columns + column_N[None, :]
    tl.store(to, result, mask=(row_M < count)[:, None] & (column_N < num_columns)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_matmul_kernel(
    x,
    weight,
    weight_RK,
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
    IS_GATED: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    WEIGHTS_FIRST: tl.constexpr,
    LOOPS: tl.constexpr,
    FLATTENS: tl.constexpr,
    IS_BULK: tl.constexpr,
    IS_PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    SIGNALS: tl.constexpr,
    WAITS: tl.constexpr,
    FOLLOWS: tl.constexpr,
):
    if FOLLOWS:
        tl.extra.cuda.gdc_wait()
    if SIGNALS:  # only now: the next one reads counts before it waits
        tl.extra.cuda.gdc_launch_dependents()
    slot_S, count_S, blocks_S, end_S, home_S, num_tiles = count_tiles(
        counts, table, num_slots, num_columns, SLOTS, BLOCK_M, BLOCK_N, HAS_TABLE
    )
    pid = tl.program_id(0)
    if WAITS:
        if pid >= num_tiles:
            # A launch must not be complete before the one it follows: who comes next relies on both.
            tl.extra.cuda.gdc_wait()
    if LOOPS:
        for tile in tl.range(pid, num_tiles, tl.num_programs(0), flatten=FLATTENS):
            _compute_tile(
                tile, x, weight, weight_RK, out, starts, factors, count_S, blocks_S, end_S, slot_S, home_S, num_rows,
                num_columns, depth, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, IS_GATED, HAS_STARTS, HAS_FACTORS,
                WEIGHTS_FIRST, IS_BULK, IS_PAIRED, PRECISION, WIDENS, WAITS,
            )  # fmt: skip
    elif pid < num_tiles:
        _compute_tile(
            pid, x, weight, weight_RK, out, starts, factors, count_S, blocks_S, end_S, slot_S, home_S, num_rows,
            num_columns, depth, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, IS_GATED, HAS_STARTS, HAS_FACTORS,
            WEIGHTS_FIRST, IS_BULK, IS_PAIRED, PRECISION, WIDENS, WAITS,
        )  # fmt: skip
