"""Products of few rows, norm, rotary embedding with KV append, and sampler: Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.few_rows import MOST_ROWS, TILING, Tiling, product
from expertmesh.kernels.sampler import gumbel_argmax, gumbel_argmax_reference
from support.kernel_checks import (
    check_add_rms_norm,
    check_gumbel_argmax,
    check_product_of_few,
    check_rope_append,
)
from support.kernel_draws import Draw

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "depth", "tiling"),
    [(1, 64, 128, TILING), (5, 72, 384, TILING), (33, 130, 200, TILING), (3, 64, 520, Tiling(64, 64, 2, 4, 2.0))],
)
def test_product_of_few_rows(num_rows: int, num_columns: int, depth: int, tiling: Tiling) -> None:
    check_product_of_few("cpu", num_rows, num_columns, depth, tiling)


def test_what_the_parts_of_a_product_do_not_serve_is_left_to_the_library() -> None:
    draw, few, many = Draw(2, "cpu"), 3, MOST_ROWS + 1
    weight_NK, bias_N = (draw.normal(*shape, dtype=torch.bfloat16) for shape in ((24, 32), (24,)))
    for num_rows, num_dims in ((0, 2), (few, 3), (MOST_ROWS, 3), (many, 2)):
        x_TK = draw.normal(num_rows, 32, dtype=torch.bfloat16)
        assert product(x_TK, weight_NK).dim() == num_dims
    x_TK = draw.normal(few, 32, dtype=torch.bfloat16)
    assert torch.equal(product(x_TK, weight_NK, bias_N), torch.nn.functional.linear(x_TK, weight_NK, bias_N))
    assert product(x_TK.float(), weight_NK.float()).dtype == torch.float32
    assert product(x_TK[:, :9].contiguous(), weight_NK[:, :9].contiguous()).dim() == 2, "rows of 18 bytes"


@pytest.mark.parametrize("num_parts", [2, 5])
def test_parts_of_products_are_added_up(num_parts: int) -> None:
    check_add_rms_norm("cpu", 3, 72, torch.bfloat16, num_parts=num_parts)
    check_rope_append("cpu", 3, torch.bfloat16, heads=4, kv_heads=2, head_dim=16, num_parts=num_parts)


@DTYPES
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (5, 100), (3, 1)])
def test_add_rms_norm(num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    check_add_rms_norm("cpu", num_tokens, hidden, dtype)


@DTYPES
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(10, 2, 32), (1, 1, 16), (8, 4, 64)])
def test_rope_append(heads: int, kv_heads: int, head_dim: int, has_norm: bool, dtype: torch.dtype) -> None:
    check_rope_append("cpu", 5, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, has_norm=has_norm)


@DTYPES
@pytest.mark.parametrize("vocab", [7, 100, 9001])
def test_gumbel_argmax(vocab: int, dtype: torch.dtype) -> None:
    check_gumbel_argmax("cpu", 5, vocab, dtype)


def test_a_draw_depends_on_its_own_sequence_alone() -> None:
    draw = Draw(1, "cpu")
    logits_SV, seed_S = draw.normal(4, 50), draw.integers(1000, 4)
    temperature_S, position_S = torch.ones(4), torch.arange(4)
    together = gumbel_argmax(logits_SV, temperature_S, seed_S, position_S)
    for s in range(4):
        alone = gumbel_argmax(*(x[s : s + 1] for x in (logits_SV, temperature_S, seed_S, position_S)))
        assert alone.item() == together[s].item()


def test_draws_are_distributed_as_the_softmax() -> None:
    """χ² of the reference, whose tokens the kernel's equal, over 20,000 positions: 7 degrees of freedom."""
    num_draws, logits_V = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, 1.5, -2.0, 0.3])
    token_S = gumbel_argmax_reference(
        logits_V.expand(num_draws, -1),
        torch.full((num_draws,), 0.7),
        torch.full((num_draws,), 1234),
        torch.arange(num_draws),
    )
    expected_V = num_draws * (logits_V / 0.7).softmax(0)
    found_V = torch.bincount(token_S, minlength=8)
    assert ((found_V - expected_V) ** 2 / expected_V).sum() < 24.3  # exceeded once in a thousand
