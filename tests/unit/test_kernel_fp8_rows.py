"""Tokens quantised for their way to the experts: Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from support.kernel_checks import check_fp8_rows

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_tokens", "hidden", "end"), [(3, 256, 2), (1, 128, 1), (2, 2176, 2), (0, 128, 0)])
def test_rows_survive_float8_within_its_noise(num_tokens: int, hidden: int, end: int, dtype: torch.dtype) -> None:
    check_fp8_rows("cpu", num_tokens, hidden, end, dtype)
