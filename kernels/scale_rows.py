"""Rows times their factors, as many as the device knows of.

Dimensions: N rows that there is room for, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import num_multiprocessors

_PROGRAMS_PER_SM = 8
_WIDTH = 4096


def scale_rows_reference(y_NH: torch.Tensor, weight_N: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """``scale_rows`` in plain torch; the other rows are 0."""
    is_there_N = torch.arange(len(y_NH), device=y_NH.device) < end
    scaled_NH = (y_NH.float() * weight_N[:, None]).to(y_NH.dtype)
    return scaled_NH.where(is_there_N[:, None], 0.0)


def scale_rows(y_NH: torch.Tensor, weight_N: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """``y[n] * weight[n]`` of the first ``end`` rows, in memory of its own; the others are left undefined.

    Args:
        y_NH: bfloat16 or float32, contiguous. weight_N: float32. end: int32 [1] on the device.
    """
    num_rows, hidden_size = y_NH.shape
    out_NH = torch.empty_like(y_NH)
    if num_rows:
        programs = min(num_rows, _PROGRAMS_PER_SM * num_multiprocessors(y_NH.device))
        width = min(_WIDTH, triton.next_power_of_2(hidden_size))
        _scale_kernel[(programs,)](y_NH, weight_N, end, out_NH, hidden_size, WIDTH=width, num_warps=4)
    return out_NH


@triton.jit
def _scale_kernel(y, weights, end, out, hidden_size, WIDTH: tl.constexpr):
    num_rows = tl.load(end)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        weight = tl.load(weights + row)
        first = (tl.full((), 0, tl.int64) + row) * hidden_size
        for start in range(0, hidden_size, WIDTH):
            h_H = start + tl.arange(0, WIDTH)
            y_H = tl.load(y + first + h_H, mask=h_H < hidden_size).to(tl.float32)
            tl.store(out + first + h_H, (y_H * weight).to(out.dtype.element_ty), mask=h_H < hidden_size)
