"""What the Triton kernels share."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run on the CPU. The interpreter multiplies no bfloat16 matrices; kernels widen them to
float32 there, in which products of bfloat16 numbers are exact as they are on tensor cores."""


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 4 in the interpreter, so that loops over tiles do loop there."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, WIDENS: tl.constexpr):
    """acc + a @ b; ``WIDENS`` is ``IS_INTERPRETED``."""
    if WIDENS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
