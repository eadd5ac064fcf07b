"""What the Triton kernels share."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1: kernels run on the CPU. The interpreter multiplies no bfloat16 matrices; kernels widen them to
float32 there, in which products of bfloat16 numbers are exact as they are on tensor cores."""

OVERLAPS = not IS_INTERPRETED
"""Kernels of a decode step begin while the launch before them is still at work (programmatic dependent launch).

One that is launched with ``OVERLAPPING`` calls ``gdc_wait`` in every program, before it touches anything that a
launch of the same step reads or writes: so it is complete only after all launches before it. Ahead of that it may
read weights, and what was there before the last launch without ``OVERLAPPING`` began. ``gdc_launch_dependents`` lets
the next begin.
"""
OVERLAPPING = {"launch_pdl": True} if OVERLAPS else {}
LINE_ELEMENTS = tl.constexpr(64)  # bfloat16 numbers in a line of the L2 cache


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


@triton.jit
def prefetch_rows(matrix_RK, row, rows_left, first, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Start reading ROWS rows of a matrix, DEPTH bfloat16 numbers from ``first`` on, into the L2 cache."""
    line_L = first + tl.arange(0, DEPTH // LINE_ELEMENTS) * LINE_ELEMENTS
    row_R = row + tl.minimum(tl.arange(0, ROWS), rows_left - 1)
    at = matrix_RK + row_R.to(tl.int64)[:, None] * depth + tl.minimum(line_L, depth - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def sum_of_parts(parts, at, stride, mask, NUM_PARTS: tl.constexpr):
    """The parts of a ``few_rows`` product added up in their order, ``stride`` elements from one to the next."""
    total = tl.load(parts + at, mask=mask, other=0.0)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(parts + part * stride + at, mask=mask, other=0.0)
    return total


@triton.jit
def load_aside(pointers, INTERPRETED: tl.constexpr):
    """32- or 64-bit integers that nothing writes meanwhile. The compiler's pipeliner does not know that it is a load.

    For addresses that a loop looks up a round ahead: a load that feeds the address of a pipelined one would halve its
    stages, and one carried from round to round ends the pipelining (Triton 3.6).
    """
    if INTERPRETED:
        return tl.load(pointers)
    elif pointers.dtype.element_ty.primitive_bitwidth == 64:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b64 $0, [$1];", "=l,l", [pointers], dtype=tl.int64, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b32 $0, [$1];", "=r,l", [pointers], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def block_of(table, position_L, end, BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr):
    """int64 blocks of positions in a paged cache. Those behind the last one count as it: no load needs a mask."""
    return load_aside(table + tl.minimum(position_L, end - 1) // BLOCK_SIZE, INTERPRETED).to(tl.int64)
