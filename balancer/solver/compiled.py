"""Compiled kernels: numba's ``njit``, typed, with its cache where there is a folder to write it to."""

from __future__ import annotations

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
    try:
        kernel = numba.njit(cache=True, error_model="numpy", nogil=True)(function)
    except RuntimeError:  # no writable cache folder anywhere: compile in every process
        kernel = numba.njit(error_model="numpy", nogil=True)(function)
    return cast(Callable[P, R], kernel)
