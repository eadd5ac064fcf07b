"""The gate's kernel against its reference, on any device; see ``kernel_checks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertmesh.kernels.gate import Gate, ReplicaPrices, RoutingTotals, SlotTables, route, route_reference
from support.kernel_draws import Draw, in_parts, poisoned


def slot_tables(
    draw: Draw,
    num_experts: int,
    *,
    width: int,
    slots_per_rank: int,
    node_R: Sequence[int],
    own_rank: int = -1,
    own_node: int = -1,
) -> SlotTables:
    """Every expert has 1 .. ``width`` replicas on ranks drawn at random."""
    device, num_ranks = draw.device, len(node_R)
    rank_EW = torch.stack([draw.order(num_ranks)[:width] for _ in range(num_experts)]).to(torch.int32)
    rank_EW[:, 1:][draw.normal(num_experts, width - 1) > 0.5] = -1
    rank_EW = rank_EW.sort(dim=1, descending=True).values  # behind the last one there is none
    replica_EW = rank_EW * slots_per_rank + draw.integers(slots_per_rank, num_experts, width).to(torch.int32)
    return SlotTables(
        replica_EW=replica_EW.where(rank_EW >= 0, -1),
        rank_EW=rank_EW,
        node_R=torch.tensor(node_R, dtype=torch.int32, device=device),
        own_rank=own_rank,
        own_node=own_node,
    )


def replica_prices(draw: Draw, tables: SlotTables) -> ReplicaPrices | None:
    """In 64ths, as rows make them: ties occur. None without replicas."""
    if tables.replica_EW.shape[1] == 1:
        return None
    prices = ReplicaPrices.equal(len(tables.node_R), draw.device)
    prices.price_R.copy_(draw.integers(24, len(tables.node_R)) / 64)
    prices.share_R.copy_(draw.normal(len(tables.node_R)).abs().double().softmax(0))
    prices.after_R.fill_(float("nan"))
    return prices


def routing_totals(num_experts: int, num_slots: int, device: str) -> RoutingTotals:
    return RoutingTotals(
        pairs_EE=torch.ones(num_experts, num_experts, dtype=torch.int64, device=device),
        slot_load_G=torch.ones(num_slots, dtype=torch.int64, device=device),
        visits=torch.ones(2, dtype=torch.int64, device=device),
    )


def check_route(
    device: str,
    gate: Gate,
    tables: SlotTables,
    num_slots: int,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    padding: int = 0,
    num_parts: int = 1,
) -> None:
    """Choices, slots and counters equal the reference's exactly; the last ``padding`` tokens are not there."""
    num_experts = len(tables.replica_EW)
    draw = Draw(num_tokens * 100 + num_experts, device)
    logits_TE = in_parts(draw.normal(num_tokens, num_experts, dtype=dtype), num_parts)
    bias_E = draw.normal(num_experts) if has_bias else None
    there = torch.tensor([num_tokens - padding], device=device, dtype=torch.int32) if padding else None
    prices, expected_prices = (replica_prices(Draw(num_tokens, device), tables) for _ in range(2))
    totals, expected_totals = (routing_totals(num_experts, num_slots, device) for _ in range(2))
    with poisoned():
        actual = route(logits_TE, gate, tables, bias_E=bias_E, num_tokens=there, prices=prices, totals=totals)
    expected = route_reference(
        logits_TE, gate, tables, bias_E=bias_E, num_tokens=there, prices=expected_prices, totals=expected_totals
    )
    assert torch.equal(actual.expert_TK, expected.expert_TK)
    assert torch.equal(actual.slot_TK, expected.slot_TK)
    torch.testing.assert_close(
        actual.weight_TK, expected.weight_TK, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6
    )
    for name in ("pairs_EE", "slot_load_G", "visits"):
        assert torch.equal(getattr(totals, name), getattr(expected_totals, name)), name
    if prices is not None and expected_prices is not None:
        torch.testing.assert_close(prices.after_R, expected_prices.after_R, rtol=1e-12, atol=1e-12)
        assert torch.equal(prices.price_R, expected_prices.price_R), "until the step is completed"
        assert not prices.rows_R.any()
