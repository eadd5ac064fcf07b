"""The gate: top-k experts of each token, their weights, the slots they go to, and the routing counts, in one launch.

Scores are softmax probabilities (Qwen3-MoE, Mixtral) or sigmoids (DeepSeek-V3, arXiv:2412.19437: chosen with a bias
for each expert and within the best groups only, weighted without the bias). Of an expert's replicas a token goes to the
one on the rank that its choices speak for together and, among equals, whose turn it is. It remembers no loads, as the
ranks' rule on the CPU (``mesh.placement``) does, and is less even.

Dimensions: T tokens, E experts, K experts a token, W most replicas of an expert, R expert ranks, G global slots, M
nodes, P length of the table of turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

Scoring = Literal["softmax", "sigmoid"]

_TINY = 1e-20  # DeepSeek-V3 divides by the sum of the chosen scores plus this


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a model's gate chooses; ``bias_E`` float32 and groups are sigmoid gates' alone."""

    top_k: int
    scoring: Scoring = "softmax"
    renormalizes: bool = True
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, kw_only=True)
class SlotTables:
    """One layer's placement on the device; tensors are replaced in place when the placement changes.

    ``replica_EW`` int32 global slots, ``rank_EW`` int32 their expert ranks, ``bias_EW`` float64 logarithms of their
    shares (-inf = no replica), ``affinity_ER`` float64, ``turn_PR`` float64 [2P, R], ``node_R`` int32.
    ``rank_limit``: the most that affinities count for a rank. ``num_turns`` is P.
    """

    replica_EW: torch.Tensor
    rank_EW: torch.Tensor
    bias_EW: torch.Tensor
    affinity_ER: torch.Tensor
    turn_PR: torch.Tensor
    node_R: torch.Tensor
    num_turns: int
    rank_limit: float


@dataclass(frozen=True, kw_only=True)
class RoutingTotals:
    """Counters of one layer that launches add to, int64, meanings as in ``mesh.statistics.RoutingCounts``.

    ``pairs_EE``; ``slot_load_G``; ``visits`` [2]: ranks, then nodes that tokens visited.
    """

    pairs_EE: torch.Tensor
    slot_load_G: torch.Tensor
    visits: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """``weight_TK`` float32 rounded to the logits' dtype, ``expert_TK`` and ``slot_TK`` int64; best expert first."""

    weight_TK: torch.Tensor
    expert_TK: torch.Tensor
    slot_TK: torch.Tensor


def route_reference(
    logits_TE: torch.Tensor,
    gate: Gate,
    tables: SlotTables,
    first_turn: torch.Tensor,
    *,
    bias_E: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    totals: RoutingTotals | None = None,
) -> Routing:
    """``route`` in plain torch."""
    valid = logits_TE.shape[0] if num_tokens is None else int(num_tokens)
    weight_TK, expert_TK = _top_k_reference(logits_TE, gate, bias_E)
    slot_TK, rank_TK = _slots_reference(expert_TK, tables, int(first_turn))
    if totals is not None:
        _count_reference(expert_TK[:valid], slot_TK[:valid], rank_TK[:valid], tables, totals)
    weight_TK[valid:], expert_TK[valid:], slot_TK[valid:] = 0.0, -1, -1
    return Routing(weight_TK, expert_TK, slot_TK)


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
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + _TINY)
    return (weight_TK * gate.scale).to(logits_TE.dtype).float(), expert_TK


def _slots_reference(expert_TK: torch.Tensor, tables: SlotTables, first_turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    token_T = torch.arange(len(expert_TK), device=expert_TK.device)
    score_TR = tables.affinity_ER[expert_TK].sum(1).clamp(max=tables.rank_limit)
    score_TR = score_TR + tables.turn_PR[(first_turn + token_T) % tables.num_turns]
    rank_TKW = tables.rank_EW[expert_TK].long()
    score_TKW = score_TR[:, None, :].expand(-1, expert_TK.shape[1], -1).gather(2, rank_TKW) + tables.bias_EW[expert_TK]
    best_TK1 = score_TKW.sort(dim=-1, descending=True, stable=True).indices[..., :1]
    slot_TK = tables.replica_EW[expert_TK].long().gather(2, best_TK1)[..., 0]
    return slot_TK, rank_TKW.gather(2, best_TK1)[..., 0]


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


def route(
    logits_TE: torch.Tensor,
    gate: Gate,
    tables: SlotTables,
    first_turn: torch.Tensor,
    *,
    bias_E: torch.Tensor | None = None,
    num_tokens: torch.Tensor | None = None,
    totals: RoutingTotals | None = None,
) -> Routing:
    """Experts, weights and slots of each token; ties go to the lowest expert and the first replica.

    Args:
        logits_TE: float32 or bfloat16, contiguous; all finite.
        first_turn: int64 [1] on the device, 0 .. P-1: the row of ``turn_PR`` that the first token takes.
        bias_E: float32, added to the scores for the choice alone.
        num_tokens: int32 or int64 [1] on the device: how many of the T tokens are there; the others, padding of a
            CUDA graph, get weight 0, expert -1 and slot -1, and are not counted.
        totals: counters to add to. A step that is run again must not be counted again: keep a step's own and add them
            up when it is complete.
    """
    num_rows, num_experts = logits_TE.shape
    weight_TK = torch.empty(num_rows, gate.top_k, dtype=torch.float32, device=logits_TE.device)
    expert_TK = torch.empty(num_rows, gate.top_k, dtype=torch.int64, device=logits_TE.device)
    slot_TK = torch.empty_like(expert_TK)
    if num_rows == 0:
        return Routing(weight_TK, expert_TK, slot_TK)
    width, num_ranks = tables.replica_EW.shape[1], len(tables.node_R)
    _route_kernel[(num_rows,)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        first_turn if num_tokens is None else num_tokens,
        first_turn,
        tables.replica_EW,
        tables.rank_EW,
        tables.bias_EW,
        tables.affinity_ER,
        tables.turn_PR,
        tables.node_R,
        weight_TK,
        expert_TK,
        slot_TK,
        expert_TK if totals is None else totals.pairs_EE,
        slot_TK if totals is None else totals.slot_load_G,
        slot_TK if totals is None else totals.visits,
        gate.scale,
        _TINY,
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
        NUM_TURNS=tables.num_turns,
        RANK_LIMIT=tables.rank_limit,
        IS_SOFTMAX=gate.scoring == "softmax",
        RENORMALIZES=gate.renormalizes,
        HAS_BIAS=bias_E is not None,
        HAS_COUNT=num_tokens is not None,
        COUNTS=totals is not None,
        num_warps=1,
    )
    return Routing(weight_TK, expert_TK, slot_TK)


@triton.jit
def _argmax(value_X, index_X, SIZE: tl.constexpr):
    """The greatest value and the lowest index that has it."""
    top = tl.max(value_X, 0)
    return top, tl.min(tl.where(value_X == top, index_X, SIZE - 1), 0)


@triton.jit
def _keep_groups(choice_E, e_E, EXPERTS: tl.constexpr, GROUP: tl.constexpr, GROUPS_2: tl.constexpr, TOP: tl.constexpr):
    """-inf for the experts outside the TOP groups; a group's score is the sum of its two best."""
    g_G = tl.arange(0, GROUPS_2)
    is_of_GE = (e_E // GROUP)[None, :] == g_G[:, None]
    value_GE = tl.where(is_of_GE, choice_E[None, :], float("-inf"))
    best_G = tl.max(value_GE, 1)
    first_G = tl.min(tl.where(value_GE == best_G[:, None], e_E[None, :], EXPERTS - 1), 1)
    second_G = tl.max(tl.where(e_E[None, :] == first_G[:, None], float("-inf"), value_GE), 1)
    if GROUP > 1:
        score_G = best_G + second_G
    else:
        score_G = best_G
    kept_E = tl.zeros_like(e_E)
    for _ in tl.static_range(TOP):
        _, group = _argmax(score_G, g_G, GROUPS_2)
        score_G = tl.where(g_G == group, float("-inf"), score_G)
        kept_E = tl.where(e_E // GROUP == group, 1, kept_E)
    return tl.where(kept_E > 0, choice_E, float("-inf"))


@triton.jit
def _route_kernel(
    logits,
    bias,
    num_tokens,
    first_turn,
    replica,
    replica_rank,
    replica_bias,
    affinity,
    turns,
    nodes,
    weights,
    experts,
    slots,
    pairs,
    slot_load,
    visits,
    scale,
    tiny,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_2: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_2: tl.constexpr,
    NUM_RANKS: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_TURNS: tl.constexpr,
    RANK_LIMIT: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    COUNTS: tl.constexpr,
):
    token = tl.program_id(0)
    k_K = tl.arange(0, CHOICES)
    is_choice_K = k_K < TOP_K
    to_K = token.to(tl.int64) * TOP_K + k_K
    is_there = True
    if HAS_COUNT:
        is_there = token < tl.load(num_tokens)
    if not is_there:
        tl.store(weights + to_K, tl.zeros((CHOICES,), tl.float32), mask=is_choice_K)
        tl.store(experts + to_K, tl.full((CHOICES,), -1, tl.int64), mask=is_choice_K)
        tl.store(slots + to_K, tl.full((CHOICES,), -1, tl.int64), mask=is_choice_K)
    else:
        e_E = tl.arange(0, EXPERTS)
        is_expert_E = e_E < NUM_EXPERTS
        logit_E = tl.load(logits + token.to(tl.int64) * NUM_EXPERTS + e_E, mask=is_expert_E, other=float("-inf"))
        logit_E = logit_E.to(tl.float32)
        if IS_SOFTMAX:
            score_E = tl.exp(logit_E - tl.max(logit_E, 0))
            score_E = score_E / tl.sum(score_E, 0)
        else:
            score_E = 1.0 / (1.0 + tl.exp(-logit_E))
        choice_E = score_E
        if HAS_BIAS:
            choice_E += tl.load(bias + e_E, mask=is_expert_E, other=0.0)
        choice_E = tl.where(is_expert_E, choice_E, float("-inf"))
        if GROUPS > 1:
            choice_E = _keep_groups(choice_E, e_E, EXPERTS, NUM_EXPERTS // GROUPS, GROUPS_2, TOP_GROUPS)
        r_R = tl.arange(0, RANKS)
        is_rank_R = r_R < NUM_RANKS
        weight_K = tl.zeros((CHOICES,), tl.float32)
        expert_K = tl.zeros((CHOICES,), tl.int32)
        affinity_R = tl.zeros((RANKS,), tl.float64)
        for k in tl.static_range(TOP_K):
            _, expert = _argmax(choice_E, e_E, EXPERTS)
            weight_K = tl.where(k_K == k, tl.sum(tl.where(e_E == expert, score_E, 0.0), 0), weight_K)
            expert_K = tl.where(k_K == k, expert, expert_K)
            choice_E = tl.where(e_E == expert, float("-inf"), choice_E)
            if WIDTH > 1:
                affinity_R += tl.load(affinity + expert * NUM_RANKS + r_R, mask=is_rank_R, other=0.0)
        if RENORMALIZES:
            weight_K = weight_K / (tl.sum(weight_K, 0) + tiny)
        weight_K = (weight_K * scale).to(logits.dtype.element_ty).to(tl.float32)
        tl.store(weights + to_K, weight_K, mask=is_choice_K)
        tl.store(experts + to_K, expert_K.to(tl.int64), mask=is_choice_K)

        # The rank that speaks loudest, among the replicas of each expert.
        w_W = tl.arange(0, WIDTH_2)
        if WIDTH > 1:
            turn = (tl.load(first_turn) + token) % NUM_TURNS
            score_R = tl.minimum(affinity_R, RANK_LIMIT)
            score_R += tl.load(turns + turn * NUM_RANKS + r_R, mask=is_rank_R, other=0.0)
            score_KW = tl.load(
                replica_bias + expert_K[:, None] * WIDTH + w_W[None, :],
                mask=is_choice_K[:, None] & (w_W < WIDTH)[None, :],
                other=float("-inf"),
            )
            rank_KW = tl.load(
                replica_rank + expert_K[:, None] * WIDTH + w_W[None, :], mask=(w_W < WIDTH)[None, :], other=0
            )
            of_rank_KW = tl.sum(tl.where(rank_KW[:, :, None] == r_R[None, None, :], score_R[None, None, :], 0.0), 2)
            score_KW = of_rank_KW + score_KW
            best_K = tl.max(score_KW, 1)
            which_K = tl.min(tl.where(score_KW == best_K[:, None], w_W[None, :], WIDTH_2 - 1), 1)
        else:
            which_K = tl.zeros((CHOICES,), tl.int32)
        slot_K = tl.load(replica + expert_K * WIDTH + which_K, mask=is_choice_K, other=0)
        tl.store(slots + to_K, slot_K.to(tl.int64), mask=is_choice_K)

        if COUNTS:
            # expert_K again, along the other dimension: there is no transpose of a vector.
            diagonal = k_K[:, None] == k_K[None, :]
            other_K = tl.sum(tl.where(diagonal, expert_K[:, None], 0), 0)
            is_pair = (k_K[:, None] <= k_K[None, :]) & is_choice_K[None, :]
            tl.atomic_add(
                pairs + expert_K[:, None] * NUM_EXPERTS + other_K[None, :],
                tl.full((CHOICES, CHOICES), 1, tl.int64),
                mask=is_pair,
                sem="relaxed",
            )
            tl.atomic_add(slot_load + slot_K, tl.full((CHOICES,), 1, tl.int64), mask=is_choice_K, sem="relaxed")
            rank_K = tl.load(replica_rank + expert_K * WIDTH + which_K, mask=is_choice_K, other=-1)
            visited_R = tl.max((rank_K[:, None] == r_R[None, :]).to(tl.int32), 0)
            node_R = tl.load(nodes + r_R, mask=is_rank_R, other=-1)
            # Nodes are numbered from 0, so there are no more of them than ranks.
            is_on_RM = (node_R[:, None] == r_R[None, :]) & (visited_R > 0)[:, None]
            tl.atomic_add(visits, tl.sum(visited_R, 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(visits + 1, tl.sum(tl.max(is_on_RM.to(tl.int32), 0), 0).to(tl.int64), sem="relaxed")
