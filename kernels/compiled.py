"""CPU kernels: numba's ``njit``, typed, cached beside the source or in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")

# Sums may be reordered, which is what lets LLVM vectorise them; NaN and infinity keep their meaning.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` compiled at its first call, once a machine; it runs without Python's lock.

    numba looks for changes in the function's own file only: a compiled function may call those of its file alone.
    """
    try:
        kernel = numba.njit(cache=True, error_model="numpy", nogil=True, fastmath=_FAST_MATH)(function)
    except RuntimeError:  # no writable cache folder anywhere: compile in every process
        kernel = numba.njit(error_model="numpy", nogil=True, fastmath=_FAST_MATH)(function)
    return cast(Callable[P, R], kernel)
