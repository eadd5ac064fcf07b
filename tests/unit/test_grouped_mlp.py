from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.grouped_mlp import grouped_expert_mlp


def reference(
    rows_NH: torch.Tensor, counts_S: torch.Tensor, gate_up_SFH: torch.Tensor, down_SHI: torch.Tensor
) -> torch.Tensor:
    """A plain float64 loop over slots."""
    outs = []
    for slot, rows in enumerate(torch.split(rows_NH.double(), counts_S.tolist())):
        gate, up = (rows @ gate_up_SFH[slot].double().T).chunk(2, dim=-1)
        outs.append((torch.nn.functional.silu(gate) * up) @ down_SHI[slot].double().T)
    return torch.cat(outs)


def check(counts: list[int], hidden: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(hidden * 1000 + width)
    num_rows, num_slots = sum(counts), len(counts)
    rows_NH = torch.randn(num_rows, hidden, generator=generator).to(dtype)
    gate_up_SFH = (torch.randn(num_slots, 2 * width, hidden, generator=generator) / hidden**0.5).to(dtype)
    down_SHI = (torch.randn(num_slots, hidden, width, generator=generator) / width**0.5).to(dtype)
    counts_S = torch.tensor(counts)
    y_NH = grouped_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)
    assert y_NH.shape == rows_NH.shape
    assert y_NH.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        y_NH.double(), reference(rows_NH, counts_S, gate_up_SFH, down_SHI), rtol=tolerance, atol=tolerance
    )


@pytest.mark.slow
@settings(max_examples=60)
@given(
    counts=st.lists(st.one_of(st.just(0), st.integers(0, 40)), min_size=1, max_size=9),
    hidden=st.sampled_from([4, 8, 16, 33, 50, 64]),
    width=st.sampled_from([1, 7, 8, 24, 56]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_equals_a_loop_over_slots(counts: list[int], hidden: int, width: int, dtype: torch.dtype) -> None:
    check(counts, hidden, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [64, 33])
@pytest.mark.parametrize("counts", [[0], [0, 0, 0], [0, 700, 0], [1, 0, 0], [0, 0, 1], [300, 1, 299]])
def test_extreme_counts(counts: list[int], hidden: int, dtype: torch.dtype) -> None:
    check(counts, hidden, 56, dtype)


def test_bfloat16_beyond_the_padded_range() -> None:
    check([900, 0, 500], 256, 56, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_values_do_not_matter(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows_NH = torch.randn(12, 64, generator=generator).to(dtype)
    gate_up_SFH = torch.randn(3, 48, 64, generator=generator).to(dtype)
    down_SHI = torch.randn(3, 64, 24, generator=generator).to(dtype)
    counts_S = torch.tensor([4, 3, 5])
    y_NH = grouped_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)
    rows_NH[:6] = 1e3
    assert torch.equal(grouped_expert_mlp(rows_NH, counts_S, gate_up_SFH, down_SHI)[6:], y_NH[6:])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 200])
def test_a_row_of_an_empty_slot_is_no_number(rows: int) -> None:
    """Empty slots hold NaN: a row that lands there by mistake must not look like an answer."""
    gate_up_SFH, down_SHI = torch.randn(3, 112, 256), torch.randn(3, 256, 56)
    gate_up_SFH[1], down_SHI[1] = torch.nan, torch.nan
    y_NH = grouped_expert_mlp(torch.randn(2 * rows, 256), torch.tensor([rows, rows, 0]), gate_up_SFH, down_SHI)
    assert y_NH[:rows].isfinite().all()
    assert y_NH[rows:].isnan().all()
