"""Compiled kernels: numba's ``njit``, typed, with its cache where there is a folder to write it to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` compiled at its first call, once a machine: the result is kept beside the source, else in the
    user's cache folder.

    No fused or reordered floating-point operations: the same input gives the same output on one kind of CPU.
    """
    return cast(Callable[P, R], numba.njit(cache=caches(), error_model="numpy", nogil=True)(function))


@functools.cache
def caches() -> bool:
    """Whether there is a folder for compiled kernels; without one they are compiled in every process."""
    try:
        numba.njit(cache=True)(_nothing)
    except RuntimeError:
        return False
    return True


def _nothing() -> None:
    pass
