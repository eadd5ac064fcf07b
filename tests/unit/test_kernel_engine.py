"""The kernels between the others of a GPU engine, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from support.engine_checks import check_embed, check_paged_prefill, check_row_groups, check_slot_table

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_slots", "padding", "dtype"),
    [
        (1, 2, 4, 0, torch.float32),
        (6, 3, 9, 2, torch.bfloat16),
        (10, 4, 9, 0, torch.float32),  # several rows a program
        (20, 4, 9, 3, torch.bfloat16),  # in four launches
    ],
)
def test_row_groups(num_tokens: int, top_k: int, num_slots: int, padding: int, dtype: torch.dtype) -> None:
    check_row_groups("cpu", num_tokens, top_k, num_slots, 5, dtype, padding=padding)


@DTYPES
def test_paged_prefill(dtype: torch.dtype) -> None:
    check_paged_prefill("cpu", [9, 0, 21], [1, 5, 35], dtype, heads=4, kv_heads=2, head_dim=16, block_size=4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (20, 1)])
def test_paged_prefill_of_heads_that_do_not_fill_a_program(heads: int, kv_heads: int) -> None:
    check_paged_prefill(
        "cpu", [0, 18], [7, 13], torch.float32, heads=heads, kv_heads=kv_heads, head_dim=16, block_size=8
    )


@DTYPES
def test_embed(dtype: torch.dtype) -> None:
    check_embed("cpu", dtype)


@DTYPES
def test_slots_behind_a_table(dtype: torch.dtype) -> None:
    check_slot_table("cpu", 64, 32, dtype)
