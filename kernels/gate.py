"""The gate: top-k experts of each token, their weights, the slots they go to, and the routing counts, in one launch.

Scores are softmax probabilities (Qwen3-MoE, Mixtral) or sigmoids (DeepSeek-V3, arXiv:2412.19437: chosen with a bias
for each expert and within the best groups only, weighted without the bias). Replicas are chosen by prices, see
``gate_rule``.

Dimensions: T tokens, E experts, K experts a token, W most replicas of an expert, R expert ranks, G global slots, M
nodes.
"""

from __future__ import annotations

import torch
import triton

from expertmesh.kernels.gate_kernel import route_kernel, settle_kernel
from expertmesh.kernels.gate_reference import route_reference
from expertmesh.kernels.gate_rule import (
    STEP_GAIN,
    TINY,
    Gate,
    ReplicaPrices,
    Routing,
    RoutingTotals,
    Scoring,
    SlotTables,
)
from expertmesh.kernels.replica_costs import MEAN_PRICE_LIMIT, ROW_PRICE
from expertmesh.kernels.triton_support import OVERLAPPING, OVERLAPS

__all__ = ["Gate", "ReplicaPrices", "Routing", "RoutingTotals", "Scoring", "SlotTables", "route", "route_reference"]


def route(
    logits_TE: torch.Tensor,
    gate: Gate,
    tables: SlotTables,
    *,
    bias_E: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    prices: ReplicaPrices | None = None,
    totals: RoutingTotals | None = None,
) -> Routing:
    """Experts, weights and slots of each token; ties go to the lowest expert and the first replica.

    Of a rank on its own, and of every layer whose tables have a width W of 1, all that is to be passed are logits, gate
    and tables: slots are looked up. With W of 2 or more ``prices`` choose among the replicas, and a second, tiny launch
    prices the ranks anew; nothing waits for the host, and all of it can be captured in a CUDA graph.

    Args:
        logits_TE: float32 or bfloat16, contiguous; all finite. Or the parts of a product, [P, T, E], see ``few_rows``.
        bias_E: float32, added to the scores for the choice alone.
        num_tokens: int32 or int64 [1] on the device: how many of the T tokens are there; the others, padding of a
            CUDA graph, get weight 0, expert -1 and slot -1, and are not counted.
        prices: of the ranks, where W is 2 or more; None where it is 1.
        totals: counters to add to. A step that is run again must not be counted again: keep a step's own and add them
            up when it is complete.
    """
    num_rows, num_experts = logits_TE.shape[-2:]
    width, num_ranks = tables.replica_EW.shape[1], len(tables.node_R)
    assert (prices is None) == (width == 1), "prices choose among replicas"
    weight_TK = torch.empty(num_rows, gate.top_k, dtype=torch.float32, device=logits_TE.device)
    expert_TK = torch.empty(num_rows, gate.top_k, dtype=torch.int64, device=logits_TE.device)
    slot_TK = torch.empty_like(expert_TK)
    if num_rows == 0:
        if prices is not None:
            prices.after_R.copy_(prices.price_R)
        return Routing(weight_TK, expert_TK, slot_TK)
    route_kernel[(num_rows,)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        expert_TK if num_tokens is None else num_tokens,
        tables.replica_EW,
        tables.rank_EW,
        tables.node_R,
        weight_TK if prices is None else prices.price_R,
        slot_TK if prices is None else prices.rows_R,
        weight_TK,
        expert_TK,
        slot_TK,
        expert_TK if totals is None else totals.pairs_EE,
        slot_TK if totals is None else totals.slot_load_G,
        slot_TK if totals is None else totals.visits,
        gate.scale,
        TINY,
        tables.own_rank,
        tables.own_node,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        TOP_K=gate.top_k,
        CHOICES=triton.next_power_of_2(gate.top_k),
        GROUPS=gate.num_groups,
        GROUPS_2=triton.next_power_of_2(gate.num_groups),
        TOP_GROUPS=gate.top_groups,
        WIDTH=width,
        WIDTH_2=triton.next_power_of_2(width),
        NUM_RANKS=num_ranks,
        RANKS=triton.next_power_of_2(num_ranks),
        IS_SOFTMAX=gate.scoring == "softmax",
        RENORMALIZES=gate.renormalizes,
        HAS_BIAS=bias_E is not None,
        HAS_COUNT=num_tokens is not None,
        COUNTS=totals is not None,
        NUM_PARTS=1 if logits_TE.dim() == 2 else len(logits_TE),
        OVERLAPS=OVERLAPS,
        num_warps=1,
        **OVERLAPPING,
    )
    if prices is not None:
        settle_kernel[(1,)](
            prices.price_R,
            prices.after_R,
            prices.share_R,
            prices.rows_R,
            ROW_PRICE,
            STEP_GAIN,
            MEAN_PRICE_LIMIT,
            NUM_RANKS=num_ranks,
            RANKS=triton.next_power_of_2(num_ranks),
            num_warps=1,
        )
    return Routing(weight_TK, expert_TK, slot_TK)
