"""Residual addition and RMS norm in one pass over the rows (Zhang & Sennrich 2019, "Root Mean Square Layer
Normalization").

Dimensions: T tokens, H hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import OVERLAPPING, OVERLAPS, sum_of_parts

_ELEMENTS_A_WARP = 512
_MOST_WARPS = 16


def add_rms_norm_reference(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
) -> torch.Tensor:
    """``add_rms_norm`` in plain torch."""
    residual_TH += x_TH if x_TH.dim() == 2 else x_TH.sum(0).to(residual_TH.dtype)
    x32_TH = residual_TH.float()
    scale_T1 = (x32_TH.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x32_TH * scale_T1).to(residual_TH.dtype) * weight_H


def add_rms_norm(x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """``residual += x``, then its RMS norm times ``weight``.

    The sum is rounded to the dtype before the norm, and the norm before the weight, as in transformers.

    Args:
        x_TH: contiguous; or the parts of a product, see ``few_rows``.
        residual_TH: bfloat16 or float32, contiguous; overwritten with the sum.
        weight_H: the same dtype.

    Returns:
        normed_TH in memory of its own.
    """
    num_tokens, hidden_size = residual_TH.shape
    normed_TH = torch.empty_like(residual_TH)
    if num_tokens:
        width = triton.next_power_of_2(hidden_size)
        _add_rms_norm_kernel[(num_tokens,)](
            x_TH,
            residual_TH,
            weight_H,
            normed_TH,
            eps,
            hidden_size,
            WIDTH=width,
            NUM_PARTS=1 if x_TH.dim() == 2 else len(x_TH),
            OVERLAPS=OVERLAPS,
            num_warps=max(1, min(_MOST_WARPS, width // _ELEMENTS_A_WARP)),
            **OVERLAPPING,
        )
    return normed_TH


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, normed, eps, hidden_size,
    WIDTH: tl.constexpr, NUM_PARTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    dtype = normed.dtype.element_ty
    h_H = tl.arange(0, WIDTH)
    is_in_H = h_H < hidden_size
    weight_H = tl.load(weight + h_H, mask=is_in_H, other=0.0).to(tl.float32)
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at_H = tl.program_id(0).to(tl.int64) * hidden_size + h_H
    x_H = sum_of_parts(x, at_H, tl.num_programs(0) * hidden_size, is_in_H, NUM_PARTS).to(dtype).to(tl.float32)
    x_H += tl.load(residual + at_H, mask=is_in_H, other=0.0).to(tl.float32)
    sum_H = x_H.to(dtype)
    tl.store(residual + at_H, sum_H, mask=is_in_H)
    x_H = sum_H.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_H * x_H, 0) / hidden_size + eps)
    tl.store(normed + at_H, ((x_H * scale).to(dtype).to(tl.float32) * weight_H).to(dtype), mask=is_in_H)
