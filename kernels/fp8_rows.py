"""Tokens as float8_e4m3 with one float32 scale per 128 elements, to halve what a dispatch sends (DeepSeek-V3, arXiv
2412.19437, §3.3).

Dimensions: T tokens, N rows that there is room for, H hidden size, B = H/128 blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import num_multiprocessors

BLOCK = 128
FP8_MAX = 448.0
"""The greatest float8_e4m3fn."""

_SMALLEST_AMAX = 1e-4  # a block of zeros has a scale too
_PROGRAMS_PER_SM = 8
_BLOCKS_AT_A_TIME = 16


def quantize_rows_reference(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows`` in plain torch."""
    x_TBE = x_TH.float().view(len(x_TH), x_TH.shape[1] // BLOCK, BLOCK)
    scale_TB = x_TBE.abs().amax(-1).clamp(min=_SMALLEST_AMAX) / FP8_MAX
    return (x_TBE / scale_TB[..., None]).to(torch.float8_e4m3fn).flatten(1), scale_TB


def quantize_rows(x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each block of 128 elements divided by a scale that brings its greatest to 448.

    Args:
        x_TH: bfloat16 or float32, contiguous, H a multiple of 128.

    Returns:
        (float8_e4m3fn [T, H], float32 scales [T, B]).
    """
    num_tokens, hidden_size = x_TH.shape
    q_TH = torch.empty_like(x_TH, dtype=torch.float8_e4m3fn)
    scale_TB = torch.empty(num_tokens, hidden_size // BLOCK, dtype=torch.float32, device=x_TH.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(scale_TB.shape[1], _BLOCKS_AT_A_TIME))
        _quantize_kernel[grid](
            x_TH,
            q_TH,
            scale_TB,
            scale_TB.shape[1],
            SMALLEST=_SMALLEST_AMAX,
            LARGEST=FP8_MAX,
            BLOCKS=_BLOCKS_AT_A_TIME,
            BLOCK_SIZE=BLOCK,
        )
    return q_TH, scale_TB


def dequantize_rows_reference(q_NH: torch.Tensor, scale_NB: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """``dequantize_rows`` in plain torch; the other rows are 0."""
    is_there_N = torch.arange(len(q_NH), device=q_NH.device) < end
    x_NBE = q_NH.float().view(len(q_NH), q_NH.shape[1] // BLOCK, BLOCK) * scale_NB[..., None]
    return x_NBE.flatten(1).to(torch.bfloat16).where(is_there_N[:, None], 0.0)


def dequantize_rows(q_NH: torch.Tensor, scale_NB: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """The first ``end`` rows as bfloat16; the others are left undefined.

    Args:
        q_NH, scale_NB: as ``quantize_rows`` makes them. end: int32 [1] on the device.
    """
    num_rows, hidden_size = q_NH.shape
    x_NH = torch.empty_like(q_NH, dtype=torch.bfloat16)
    if num_rows:
        programs = min(num_rows, _PROGRAMS_PER_SM * num_multiprocessors(q_NH.device))
        _dequantize_kernel[(programs,)](
            q_NH, scale_NB, end, x_NH, hidden_size // BLOCK, BLOCKS=_BLOCKS_AT_A_TIME, BLOCK_SIZE=BLOCK
        )
    return x_NH


@triton.jit
def _quantize_kernel(
    x, q, scales, num_blocks,
    SMALLEST: tl.constexpr, LARGEST: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b_B = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at_BE = (row * num_blocks + b_B)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    is_in_BE = (b_B < num_blocks)[:, None]
    x_BE = tl.load(x + at_BE, mask=is_in_BE, other=0.0).to(tl.float32)
    scale_B = tl.maximum(tl.max(tl.abs(x_BE), 1), SMALLEST) / LARGEST
    q_BE = tl.div_rn(x_BE, tl.broadcast_to(scale_B[:, None], (BLOCKS, BLOCK_SIZE)))
    tl.store(q + at_BE, q_BE.to(q.dtype.element_ty), mask=is_in_BE)
    tl.store(scales + row * num_blocks + b_B, scale_B, mask=b_B < num_blocks)


@triton.jit
def _dequantize_kernel(q, scales, end, x, num_blocks, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    num_rows = tl.load(end)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        for start in range(0, num_blocks, BLOCKS):
            b_B = start + tl.arange(0, BLOCKS)
            at_B = (tl.full((), 0, tl.int64) + row) * num_blocks + b_B
            at_BE = at_B[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
            is_in_BE = (b_B < num_blocks)[:, None]
            q_BE = tl.load(q + at_BE, mask=is_in_BE, other=0.0).to(tl.float32)
            scale_B = tl.load(scales + at_B, mask=b_B < num_blocks, other=0.0)
            tl.store(x + at_BE, (q_BE * scale_B[:, None]).to(x.dtype.element_ty), mask=is_in_BE)
