"""``gate.route`` in plain torch.

Dimensions as in ``gate``; T tokens.
"""

from __future__ import annotations

import torch

from expertmesh.kernels.gate_rule import (
    SPREAD,
    SPREAD_KEYS,
    STEP_GAIN,
    TINY,
    Gate,
    ReplicaPrices,
    Routing,
    RoutingTotals,
    SlotTables,
)
from expertmesh.kernels.replica_costs import MEAN_PRICE_LIMIT, NODE_COST, RANK_COST, ROW_PRICE

_MASK = 0xFFFFFFFF


def route_reference(
    logits_TE: torch.Tensor,
    gate: Gate,
    tables: SlotTables,
    *,
    bias_E: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    prices: ReplicaPrices | None = None,
    totals: RoutingTotals | None = None,
) -> Routing:
    """See ``gate.route``."""
    if logits_TE.dim() == 3:
        logits_TE = logits_TE.sum(0).bfloat16()
    valid = logits_TE.shape[0] if num_tokens is None else int(num_tokens)
    weight_TK, expert_TK = _top_k_reference(logits_TE, gate, bias_E)
    if prices is None:
        which_TK = torch.zeros_like(expert_TK)
    else:
        which_TK = choose_replicas(expert_TK, tables, prices.price_R)
    slot_TK = tables.replica_EW[expert_TK, which_TK].long()
    rank_TK = tables.rank_EW[expert_TK, which_TK].long()
    if prices is not None:
        prices.after_R.copy_(settled_prices(prices, rank_TK[:valid]))
    if totals is not None:
        _count_reference(expert_TK[:valid], slot_TK[:valid], rank_TK[:valid], tables, totals)
    weight_TK[valid:], expert_TK[valid:], slot_TK[valid:] = 0.0, -1, -1
    return Routing(weight_TK, expert_TK, slot_TK)


def choose_replicas(expert_TK: torch.Tensor, tables: SlotTables, price_R: torch.Tensor) -> torch.Tensor:
    """Which of its expert's replicas each choice takes, int64 [T, K]; all tokens at these prices, float64."""
    (num_tokens, top_k), width = expert_TK.shape, tables.rank_EW.shape[1]
    device, node_R = expert_TK.device, tables.node_R.long()
    token_T, num_ranks = torch.arange(num_tokens, device=device), len(node_R)
    rank_TKW = tables.rank_EW[expert_TK].long()
    is_there_TKW = rank_TKW >= 0
    is_on_TKR = torch.zeros(num_tokens, top_k, num_ranks + 1, dtype=torch.bool, device=device)
    is_on_TKR = is_on_TKR.scatter_(2, rank_TKW.where(is_there_TKW, num_ranks), True)[..., :num_ranks]
    rank_TKW = rank_TKW.clamp(min=0)
    open_TK = is_there_TKW.sum(2) > 1
    is_same_RR = (node_R[:, None] == node_R).double()
    visited_TR = (is_on_TKR & ~open_TK[..., None]).any(1)
    near_TR = (visited_TR.double() @ is_same_RR) > 0
    near_TR |= node_R == tables.own_node
    visited_TR |= torch.arange(num_ranks, device=device) == tables.own_rank
    price_TR = price_R + SPREAD * spread(token_T, num_ranks)
    which_TK = torch.zeros_like(expert_TK)
    for _ in range(top_k):
        reach_TR = (is_on_TKR & open_TK[..., None]).sum(1).clamp(min=1)
        visit_TR = torch.where(near_TR, RANK_COST, RANK_COST + NODE_COST).double() / reach_TR
        cost_TR = price_TR + visit_TR.where(~visited_TR, 0.0)
        cost_TKW = cost_TR[:, None, :].expand(-1, top_k, -1).gather(2, rank_TKW)
        cost_TN = cost_TKW.where(is_there_TKW & open_TK[..., None], torch.inf).flatten(1)
        is_any_T, best_T = cost_TN.isfinite().any(1), cost_TN.sort(dim=1, stable=True).indices[:, 0]
        t, k, w = token_T[is_any_T], (best_T // width)[is_any_T], (best_T % width)[is_any_T]
        which_TK[t, k], open_TK[t, k], visited_TR[t, rank_TKW[t, k, w]] = w, False, True
        near_TR[t] |= node_R[rank_TKW[t, k, w]][:, None] == node_R
    return which_TK


def spread(token_T: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Numbers from 0 to 1 for each place in a step and rank, float64 [T, R]."""
    rank_R = torch.arange(num_ranks, device=token_T.device)
    key_token, key_rank, key_mix = SPREAD_KEYS
    x_TR = (token_T[:, None] * key_token + rank_R * key_rank) & _MASK
    x_TR = (x_TR ^ (x_TR >> 15)) * key_mix & _MASK
    x_TR = (x_TR ^ (x_TR >> 13)) * key_mix & _MASK
    return (x_TR ^ (x_TR >> 16)).double() * 2.0**-32


def settled_prices(prices: ReplicaPrices, rank_TK: torch.Tensor) -> torch.Tensor:
    """The prices after a step that sent its rows to these ranks, float64 [R]."""
    num_ranks = len(prices.price_R)
    rows_R = torch.bincount(rank_TK.flatten(), minlength=num_ranks).double()
    num_rows = rows_R.sum()
    rate = (STEP_GAIN * num_ranks / num_rows.clamp(min=1.0)).clamp(max=ROW_PRICE)
    price_R = (prices.price_R + rate * (rows_R - num_rows * prices.share_R)).clamp(min=0.0)
    beyond = (price_R.sum() - MEAN_PRICE_LIMIT * num_ranks).clamp(min=0.0)
    return (price_R - beyond / (price_R > 0).sum().clamp(min=1)).clamp(min=0.0)


def _top_k_reference(
    logits_TE: torch.Tensor, gate: Gate, bias_E: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    logits32_TE = logits_TE.float()
    score_TE = logits32_TE.softmax(-1) if gate.scoring == "softmax" else logits32_TE.sigmoid()
    choice_TE = score_TE if bias_E is None else score_TE + bias_E
    if gate.num_groups > 1:
        grouped = choice_TE.view(len(choice_TE), gate.num_groups, -1)
        group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = group_score.sort(dim=-1, descending=True, stable=True).indices[:, : gate.top_groups]
        is_kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, kept, True)
        choice_TE = grouped.where(is_kept[..., None], float("-inf")).flatten(-2)
    expert_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, : gate.top_k]
    weight_TK = score_TE.gather(1, expert_TK)
    if gate.renormalizes:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + TINY)
    return (weight_TK * gate.scale).to(logits_TE.dtype).float(), expert_TK


def _count_reference(
    expert_TK: torch.Tensor, slot_TK: torch.Tensor, rank_TK: torch.Tensor, tables: SlotTables, totals: RoutingTotals
) -> None:
    num_experts, num_ranks = len(totals.pairs_EE), len(tables.node_R)
    first_P, second_P = torch.triu_indices(expert_TK.shape[1], expert_TK.shape[1], device=expert_TK.device)
    code = expert_TK[:, first_P] * num_experts + expert_TK[:, second_P]
    totals.pairs_EE.view(-1).add_(torch.bincount(code.flatten(), minlength=num_experts**2))
    totals.slot_load_G.add_(torch.bincount(slot_TK.flatten(), minlength=len(totals.slot_load_G)))
    for index, (value_TK, size) in enumerate(((rank_TK, num_ranks), (tables.node_R.long()[rank_TK], num_ranks))):
        seen = torch.zeros(len(expert_TK), size, dtype=torch.int64, device=expert_TK.device)
        totals.visits[index] += seen.scatter_(1, value_TK, 1).sum()
