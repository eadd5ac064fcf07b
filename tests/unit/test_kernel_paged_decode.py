"""The paged decode attention kernel, in the interpreter."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import pytest
import torch

from expertmesh.kernels.paged_decode import DecodePlan, Tuning, paged_decode_attention
from support.kernel_checks import check_paged_decode

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("programs_per_sm", [1, 4])
@pytest.mark.parametrize("lengths", [[5, 0, 70], [1], [33, 32, 31], [0, 0], [0, 150, 0, 2]], ids=str)
def test_equals_the_reference(lengths: list[int], programs_per_sm: int, dtype: torch.dtype) -> None:
    tuning = Tuning(
        programs_per_sm, 16, 4, 2, least_tokens=0 if programs_per_sm == 1 else 48, looks_ahead=bool(lengths[0])
    )
    check_paged_decode("cpu", lengths, dtype, heads=8, kv_heads=2, head_dim=32, block_size=16, tuning=tuning)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (20, 1)])
def test_groups_of_queries(heads: int, kv_heads: int) -> None:
    tuning = Tuning(4, 16, 4, 2)
    check_paged_decode(
        "cpu", [40, 3], torch.float32, heads=heads, kv_heads=kv_heads, head_dim=16, block_size=4, tuning=tuning
    )


def test_no_sequences() -> None:
    cache = torch.zeros(1, 16, 2, 16)
    out = paged_decode_attention(
        torch.zeros(0, 4, 16), cache, cache, torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    )
    assert out.shape == (0, 4, 16)


def test_writes_where_it_is_told_and_nothing_beyond() -> None:
    """As in a step whose further tokens belong to chunks, and whose table has their sequences too."""
    generator = torch.Generator().manual_seed(3)
    q_SHD, cache = (torch.randn(shape, generator=generator) for shape in ((3, 4, 16), (4, 16, 2, 16)))
    blocks_ST, lengths_S = torch.tensor([[0, 1], [2, 0], [3, 0], [9, 9]]), torch.tensor([20, 5, 0])
    out_THD = torch.full((5, 4, 16), 7.0)
    found = paged_decode_attention(q_SHD, cache, cache, blocks_ST, lengths_S, out_SHD=out_THD[:3])
    assert found.data_ptr() == out_THD.data_ptr()
    assert torch.equal(found, paged_decode_attention(q_SHD, cache, cache, blocks_ST[:3], lengths_S))
    assert not out_THD[2].any(), "no context gives 0"
    assert (out_THD[3:] == 7).all()


@pytest.mark.parametrize("lengths", [[0, 1, 15, 16, 17, 700, 64, *[33] * 30], [0, 0], [5, 0, 40], [9000]], ids=len)
@pytest.mark.parametrize("programs_per_sm", [1, 20])
def test_a_plan_covers_every_position_once_in_parts_of_at_most_a_share(
    lengths: list[int], programs_per_sm: int
) -> None:
    """More parts than one program of the planner makes, contexts of length 0, shares of less than a step."""
    device, tuning = torch.device("cpu"), Tuning(programs_per_sm, 16, 4, 2)
    plan = DecodePlan(max_seqs=64, num_heads=4, num_kv_heads=2, head_dim=16, device=device, tuning=tuning)
    plan.update(torch.tensor(lengths))
    entries = plan.entries[: plan.num_parts(len(lengths))].tolist()
    used = [entry for entry in entries if entry[0] >= 0]
    assert used == entries[: len(used)], "programs without work come last"
    share = max(1, ceil(ceil(sum(lengths) / plan.num_shares(len(lengths))) / 16)) * 16
    bounds = plan.first_parts[: len(lengths) + 1].tolist()
    assert (bounds[0], bounds[-1]) == (0, len(used))
    for seq, (length, (first, last)) in enumerate(zip(lengths, pairwise(bounds), strict=True)):
        own = used[first:last]
        assert [(entry[0], entry[3]) for entry in own] == [(seq, len(own))] * (last - first)
        edges = [own[0][1], *(entry[2] for entry in own)]
        assert (edges[0], edges[-1]) == (0, length)
        assert [entry[1] for entry in own] == edges[:-1]
        assert length == 0 or all(0 < after - before <= share for before, after in pairwise(edges))


@pytest.mark.parametrize(("num_positions", "share"), [(320, 16), (321, 64)])
def test_a_short_batch_is_cut_into_single_steps(num_positions: int, share: int) -> None:
    """20 shares of 16 positions where that is enough, or else 6."""
    device, tuning = torch.device("cpu"), Tuning(3, 16, 4, 2, short_programs_per_sm=10)
    plan = DecodePlan(max_seqs=64, num_heads=4, num_kv_heads=2, head_dim=16, device=device, tuning=tuning)
    lengths = [1] * 33 + [num_positions - 33]
    plan.update(torch.tensor(lengths))
    entries = [entry for entry in plan.entries[: plan.num_parts(len(lengths))].tolist() if entry[0] >= 0]
    assert len(entries) == 33 + ceil((num_positions - 33) / share)
    assert max(end - start for _, start, end, _ in entries) == share


def test_a_plan_serves_no_larger_batch() -> None:
    plan = DecodePlan(max_seqs=2, num_heads=4, num_kv_heads=2, head_dim=16, device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="a plan for 2 sequences"):
        plan.update(torch.tensor([1, 1, 1]))
