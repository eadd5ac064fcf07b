"""A dense layer's product for the few rows of a decode step, whose time is that of reading the weights.

The depth is cut so that every multiprocessor reads, and whoever uses the result adds up the parts: norm, rotary
embedding and gate read it anyway. While the launch before is still at work, the weights come into the L2 cache.

Dimensions: T rows (tokens), N columns of the result, K depth, P parts of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.triton_support import (
    IS_INTERPRETED,
    OVERLAPPING,
    OVERLAPS,
    dot,
    num_multiprocessors,
    prefetch_rows,
)

MOST_ROWS = 64
"""Beyond that the library's product is faster."""
_LEAST_ROWS = 16
_BULK_COPY_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Tiling:
    """A program's ``columns`` of the result, its ``depth`` at a time; ``programs_per_sm``: how far the sum is cut."""

    columns: int
    depth: int
    stages: int
    warps: int
    programs_per_sm: float


TILING = Tiling(64, 128, 4, 4, 1.0)
"""Measured by ``benchmarks/gpu/kernels.py --only few_rows --sweep``."""


def product(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weightᵀ``, or its parts where there are few rows.

    Args:
        x_TK, weight_NK: the same dtype, contiguous.

    Returns:
        [T, N] in x's dtype, or float32 [P, T, N] (bfloat16 without a bias, up to ``MOST_ROWS`` rows): the sum over P,
        in its order and then rounded to x's dtype, is the product.
    """
    if bias_N is not None or not 0 < len(x_TK) <= MOST_ROWS or not _is_bulk(x_TK, weight_NK):
        return F.linear(x_TK, weight_NK, bias_N)
    return parts_of_product(x_TK, weight_NK, TILING)


def parts_of_product(x_TK: torch.Tensor, weight_NK: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """float32 [P, T, N]; see ``product``."""
    num_rows, depth = x_TK.shape
    num_columns = len(weight_NK)
    column_tiles = triton.cdiv(num_columns, tiling.columns)
    wanted = max(1, round(tiling.programs_per_sm * num_multiprocessors(x_TK.device) / column_tiles))
    share = triton.cdiv(triton.cdiv(depth, wanted), tiling.depth) * tiling.depth
    num_parts = triton.cdiv(depth, share)
    rows = max(_LEAST_ROWS, triton.next_power_of_2(num_rows))
    parts_PTN = torch.empty(num_parts, num_rows, num_columns, dtype=torch.float32, device=x_TK.device)
    _few_rows_kernel[(column_tiles, num_parts)](
        TensorDescriptor.from_tensor(x_TK, [rows, tiling.depth]),
        TensorDescriptor.from_tensor(weight_NK, [tiling.columns, tiling.depth]),
        weight_NK,
        parts_PTN,
        num_rows,
        num_columns,
        depth,
        ROWS=rows,
        COLUMNS=tiling.columns,
        DEPTH=tiling.depth,
        SHARE=share,
        STAGES=tiling.stages,
        WIDENS=IS_INTERPRETED,
        OVERLAPS=OVERLAPS,
        num_warps=tiling.warps,
        **OVERLAPPING,
    )
    return parts_PTN


def _is_bulk(*matrices: torch.Tensor) -> bool:
    """The bulk copy engine reads them, and tensor cores keep their precision."""
    return all(m.dtype == torch.bfloat16 and m.shape[-1] * 2 % _BULK_COPY_ALIGNMENT_BYTES == 0 for m in matrices)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x,
    weight,
    weight_NK,
    parts,
    num_rows,
    num_columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SHARE: tl.constexpr,
    STAGES: tl.constexpr,
    WIDENS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS
    first = tl.program_id(1) * SHARE
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        for k in tl.static_range(0, SHARE, DEPTH):
            prefetch_rows(weight_NK, column, num_columns - column, first + k, depth, COLUMNS, DEPTH)
        tl.extra.cuda.gdc_wait()
    # The weights are the left operand: tensor cores take 64 rows at least on the left, but 8 on the right.
    acc_NT = tl.zeros((COLUMNS, ROWS), tl.float32)
    for k in tl.range(first, first + SHARE, DEPTH, num_stages=STAGES):
        acc_NT = dot(weight.load([column, k]), tl.trans(x.load([0, k])), acc_NT, "tf32", WIDENS)
    row_T = tl.arange(0, ROWS)
    column_N = column + tl.arange(0, COLUMNS)
    to = parts + (tl.program_id(1) * num_rows + row_T)[:, None] * num_columns + column_N[None, :]
    tl.store(to, tl.trans(acc_NT), mask=(row_T < num_rows)[:, None] & (column_N < num_columns)[None, :])
