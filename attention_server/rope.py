"""Rotary embedding: the angles of each position, and the order of features in which it is one complex product.

Dimensions: P positions, T tokens, C heads, D features of a head that take part, R = D/2 pairs.
"""

from __future__ import annotations

import math

import torch

from expertmesh.mesh.model.architecture import Architecture, LinearScaling, Llama3Scaling, Rope, YarnScaling

_TABLE_POSITIONS = 2**18
"""Beyond it the angles are computed step by step: the table would take gigabytes."""


class Rotations:
    """exp(i·position·frequency) of positions, complex64, in float32 as transformers computes it."""

    def __init__(self, arch: Architecture) -> None:
        width = rotated_width(arch)
        frequency_R = frequencies(arch.rope, arch.rope_theta, arch.rope.dim or width)
        factor = arch.rope.scaling.attention_factor if isinstance(arch.rope.scaling, YarnScaling) else 1.0
        # Features that do not rotate turn by nothing, so that one product serves the whole head.
        still = width // 2 - len(frequency_R)
        self._frequency_R = torch.cat([frequency_R, torch.zeros(still)])
        self._factor_R = torch.cat([torch.full((len(frequency_R),), factor), torch.ones(still)])
        is_short = arch.max_model_len <= _TABLE_POSITIONS
        self._table_PR = self._compute(torch.arange(arch.max_model_len)) if is_short else None

    def __call__(self, position_T: torch.Tensor) -> torch.Tensor:
        """[T, R] of int64 positions."""
        if self._table_PR is None:
            return self._compute(position_T)
        return self._table_PR.index_select(0, position_T)

    def _compute(self, position_T: torch.Tensor) -> torch.Tensor:
        angle_TR = position_T.float()[:, None] * self._frequency_R
        return torch.complex(angle_TR.cos() * self._factor_R, angle_TR.sin() * self._factor_R)


def rotated_width(arch: Architecture) -> int:
    """D: a head's features, or those of latent attention that are kept for rotation."""
    latent = arch.attention.latent
    return arch.head_dim if latent is None else latent.rope_dim


def rotate(x_TCD: torch.Tensor, rotation_T1R: torch.Tensor) -> torch.Tensor:
    """Turn features that stand in pairs (see ``pair_features``); in float32, in x's memory where that is its dtype."""
    x32_TCD = x_TCD.float()
    torch.view_as_complex(x32_TCD.view(*x_TCD.shape[:-1], -1, 2)).mul_(rotation_T1R)
    return x32_TCD


def pair_features(rows: torch.Tensor, head_dim: int, rope: Rope) -> torch.Tensor:
    """Reorder the rows of a weight, head by head, so that features which rotate together stand side by side.

    Feature i rotates with i + dim/2 of the first ``dim``, or with its neighbour already. Scores do not change when
    queries and keys are reordered alike.
    """
    if rope.interleaved:
        return rows
    dim = rope.dim or head_dim
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    halves = heads[:, :dim].reshape(len(heads), 2, dim // 2, *rows.shape[1:])
    turned = halves.transpose(1, 2).reshape(len(heads), dim, *rows.shape[1:])
    return torch.cat([turned, heads[:, dim:]], dim=1).reshape(rows.shape)


def frequencies(rope: Rope, theta: float, dim: int) -> torch.Tensor:
    """float32 [dim/2], radians a position."""
    exponent = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequency_R = 1.0 / theta**exponent
    match rope.scaling:
        case None:
            return frequency_R
        case LinearScaling():
            return frequency_R / rope.scaling.factor
        case Llama3Scaling():
            return _llama3(frequency_R, rope.scaling)
        case YarnScaling():
            return _yarn(frequency_R, rope.scaling, theta, dim)


def _llama3(frequency_R: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Frequencies between ``low_freq_factor`` and ``high_freq_factor`` turns in the trained context are blended."""
    turns_R = scaling.original_max_len * frequency_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_R = ((turns_R - low) / (high - low)).clamp(0, 1) if high > low else (turns_R >= low).float()
    return (1 - kept_R) * frequency_R / scaling.factor + kept_R * frequency_R


def _yarn(frequency_R: torch.Tensor, scaling: YarnScaling, theta: float, dim: int) -> torch.Tensor:
    """arXiv:2309.00071, section 3.2: pairs of few turns in the trained context are interpolated, of many kept."""

    def pair_of(turns: float) -> float:
        return dim * math.log(scaling.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    kept_R = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency_R / scaling.factor * (1 - kept_R) + frequency_R * kept_R
