"""Norm, rotary embedding with KV append, and sampler: Triton kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.sampler import gumbel_argmax, gumbel_argmax_reference
from support.kernel_checks import check_add_rms_norm, check_gumbel_argmax, check_rope_append
from support.kernel_draws import Draw

pytestmark = pytest.mark.slow

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


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
