"""Quantised weights as floats, on the CPU: the reference of every kernel that will take them as they are."""

from __future__ import annotations

import torch

from expertmesh.mesh.model.quantisation.formats import FP8_BLOCK, WORD_BITS

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the three bits below the sign of a 4-bit float stand for."""

_EXPONENT_BIAS = 127


def dequantise_fp8(weight_OI: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [O, I] of float8 numbers, each block of 128 × 128 times its scale; blocks at the edges may be smaller."""
    rows, columns = weight_OI.shape
    wide = scale.float().repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return weight_OI.float().mul_(wide.repeat_interleave(FP8_BLOCK, 0)[:rows])


def dequantise_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., G·32] of ``blocks`` uint8 [..., G, 16], the first number in the low bits, and ``scales`` uint8
    [..., G]: exponents of two, biased by 127."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)
    values = table[pairs.int()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - _EXPONENT_BIAS).flatten(-2)


def dequantise_ints(packed: torch.Tensor, scale: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """float32 [O, columns] of int32 words [O, W], the first number in the low bits, biased by half their range.

    ``scale`` [O, G]: one factor for each of G equal groups of a row's numbers.
    """
    shifts = torch.arange(0, WORD_BITS, num_bits, dtype=torch.int32)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**num_bits - 1)
    values: torch.Tensor = (codes.flatten(1)[:, :columns] - 2 ** (num_bits - 1)).float()
    values *= scale.float().repeat_interleave(columns // scale.shape[1], 1)
    return values
