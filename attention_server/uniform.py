"""Uniform numbers that depend on (seed, position) alone, so that sampling never depends on the batch or the server."""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seed_S: np.ndarray, position_S: np.ndarray) -> np.ndarray:
    """One number of [0, 1) for each (seed, position).

    ``mix(mix(seed + γ) + (position + 1)·γ)`` with splitmix64's γ and finaliser (Steele, Lea & Flood 2014, "Fast
    splittable pseudorandom number generators"): each seed, scrambled, starts its own splitmix64 stream and ``position``
    indexes it.

    Args:
        seed_S: uint64. position_S: non-negative integers.

    Returns: float64 multiples of 2⁻⁵²: times a total, none of them rounds up to the total.
    """
    stream_S = _mix(seed_S + _GOLDEN)
    bits_S = _mix(stream_S + (position_S.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (bits_S >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed
