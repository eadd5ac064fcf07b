"""The launches of ``gate.route``: the experts, weights and slots of a token each, then the prices of the ranks.

Dimensions as in ``gate``; names in capitals are powers of two above the sizes that ``NUM_`` ones give.
"""

from __future__ import annotations

import triton
import triton.language as tl

from expertmesh.kernels.gate_rule import SPREAD, SPREAD_KEYS
from expertmesh.kernels.replica_costs import NODE_COST, RANK_COST
from expertmesh.kernels.triton_support import sum_of_parts

_RANK_COST = tl.constexpr(RANK_COST)
_NODE_COST = tl.constexpr(NODE_COST)
_SPREAD = tl.constexpr(SPREAD * 2.0**-32)
_KEY_TOKEN = tl.constexpr(SPREAD_KEYS[0])
_KEY_RANK = tl.constexpr(SPREAD_KEYS[1])
_KEY_MIX = tl.constexpr(SPREAD_KEYS[2])
_FAR = tl.constexpr(1e300)
_TAKEN = tl.constexpr(-(2**31))


@triton.jit
def _argmax(value_X, index_X, SIZE: tl.constexpr):
    """The greatest value and the lowest index that has it."""
    top = tl.max(value_X, 0)
    return top, tl.min(tl.where(value_X == top, index_X, SIZE - 1), 0)


@triton.jit
def _in_order(value_X):
    """int32 that compare as these float32 do: a warp finds the greatest of integers in one instruction."""
    bits_X = value_X.to(tl.int32, bitcast=True)
    return tl.where(bits_X < 0, bits_X ^ 0x7FFFFFFF, bits_X)


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
def _spread(token, r_R):
    """What the token adds to the price of each rank: float64, the same for the same place in a step."""
    x_R = r_R.to(tl.uint32) * _KEY_RANK + (tl.zeros_like(r_R) + token).to(tl.uint32) * _KEY_TOKEN
    x_R = (x_R ^ (x_R >> 15)) * _KEY_MIX
    x_R = (x_R ^ (x_R >> 13)) * _KEY_MIX
    return (x_R ^ (x_R >> 16)).to(tl.float64) * _SPREAD


@triton.jit
def _choose_replicas(
    rank_KW, price_R, node_R, own_rank, own_node, r_R,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, WIDTH_2: tl.constexpr,
):  # fmt: skip
    """Which replica each choice takes: again and again the open choice and the rank that cost least."""
    k_K = tl.arange(0, CHOICES)
    at_KW = k_K[:, None] * WIDTH_2 + tl.arange(0, WIDTH_2)[None, :]
    is_there_KW = rank_KW >= 0
    is_on_KWR = rank_KW[:, :, None] == r_R[None, None, :]
    num_there_K = tl.sum(is_there_KW.to(tl.int32), 1)
    open_K = (num_there_K > 1).to(tl.int32)
    first_K = tl.max(tl.where(at_KW == k_K[:, None] * WIDTH_2, rank_KW, -1), 1)
    fixed_KR = (num_there_K == 1)[:, None] & (first_K[:, None] == r_R[None, :])
    visited_R = tl.maximum(tl.max(fixed_KR.to(tl.int32), 0), (r_R == own_rank).to(tl.int32))
    node_of_K = tl.sum(tl.where(fixed_KR, node_R[None, :] + 1, 0), 1) - 1
    near_R = tl.max(((node_of_K[:, None] == node_R[None, :]) & (node_of_K >= 0)[:, None]).to(tl.int32), 0)
    near_R = tl.maximum(near_R, (node_R == own_node).to(tl.int32))
    reach_R = tl.sum(tl.sum((is_on_KWR & (open_K > 0)[:, None, None]).to(tl.int32), 1), 0)
    which_K = tl.zeros((CHOICES,), tl.int32)
    for _ in tl.static_range(TOP_K):
        visit_R = tl.where(near_R > 0, _RANK_COST, _RANK_COST + _NODE_COST).to(tl.float64)
        visit_R = tl.where(visited_R > 0, 0.0, visit_R / tl.maximum(reach_R, 1).to(tl.float64))
        cost_KW = tl.sum(tl.where(is_on_KWR, (price_R + visit_R)[None, None, :], 0.0), 2)
        cost_KW = tl.where(is_there_KW & (open_K > 0)[:, None], cost_KW, _FAR)
        least = tl.min(tl.min(cost_KW, 1), 0)
        if least < _FAR:
            best = tl.min(tl.min(tl.where(cost_KW == least, at_KW, CHOICES * WIDTH_2), 1), 0)
            rank = tl.sum(tl.sum(tl.where(at_KW == best, rank_KW, 0), 1), 0)
            is_taken_K = k_K == best // WIDTH_2
            which_K = tl.where(is_taken_K, best % WIDTH_2, which_K)
            open_K = tl.where(is_taken_K, 0, open_K)
            visited_R = tl.where(r_R == rank, 1, visited_R)
            node = tl.sum(tl.where(r_R == rank, node_R, 0), 0)
            near_R = tl.where(node_R == node, 1, near_R)
            reach_R -= tl.sum(tl.sum((is_on_KWR & is_taken_K[:, None, None]).to(tl.int32), 1), 0)
    return which_K


@triton.jit
def route_kernel(
    logits,
    bias,
    num_tokens,
    replica,
    replica_rank,
    nodes,
    prices,
    rows,
    weights,
    experts,
    slots,
    pairs,
    slot_load,
    visits,
    scale,
    tiny,
    own_rank,
    own_node,
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
    IS_SOFTMAX: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    COUNTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    # Parts are those of a product of bfloat16 numbers, rounded as the product would be.
    dtype: tl.constexpr = logits.dtype.element_ty if NUM_PARTS == 1 else tl.bfloat16
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
        at_E = token.to(tl.int64) * NUM_EXPERTS + e_E
        logit_E = sum_of_parts(logits, at_E, tl.num_programs(0) * NUM_EXPERTS, is_expert_E, NUM_PARTS)
        logit_E = tl.where(is_expert_E, logit_E.to(dtype).to(tl.float32), float("-inf"))
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
        order_E = _in_order(choice_E)
        for k in tl.static_range(TOP_K):
            top, expert = _argmax(order_E, e_E, EXPERTS)
            if HAS_BIAS:
                weight = tl.sum(tl.where(e_E == expert, score_E, 0.0), 0)
            else:  # what is chosen by is the score itself, and no score is negative
                weight = top.to(tl.float32, bitcast=True)
            weight_K = tl.where(k_K == k, weight, weight_K)
            expert_K = tl.where(k_K == k, expert, expert_K)
            order_E = tl.where(e_E == expert, _TAKEN, order_E)
        if RENORMALIZES:
            weight_K = weight_K / (tl.sum(weight_K, 0) + tiny)
        weight_K = (weight_K * scale).to(dtype).to(tl.float32)
        tl.store(weights + to_K, weight_K, mask=is_choice_K)
        tl.store(experts + to_K, expert_K.to(tl.int64), mask=is_choice_K)

        which_K = tl.zeros((CHOICES,), tl.int32)
        node_R = tl.load(nodes + r_R, mask=is_rank_R, other=-2)
        if WIDTH > 1:
            w_W = tl.arange(0, WIDTH_2)
            rank_KW = tl.load(
                replica_rank + expert_K[:, None] * WIDTH + w_W[None, :],
                mask=is_choice_K[:, None] & (w_W < WIDTH)[None, :],
                other=-1,
            )
            price_R = tl.load(prices + r_R, mask=is_rank_R, other=0.0) + _spread(token, r_R)
            which_K = _choose_replicas(rank_KW, price_R, node_R, own_rank, own_node, r_R, TOP_K, CHOICES, WIDTH_2)
        rank_K = tl.load(replica_rank + expert_K * WIDTH + which_K, mask=is_choice_K, other=-1)
        if WIDTH > 1:
            tl.atomic_add(rows + rank_K, tl.full((CHOICES,), 1, tl.int64), mask=is_choice_K, sem="relaxed")
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
            visited_R = tl.max((rank_K[:, None] == r_R[None, :]).to(tl.int32), 0)
            # Nodes are numbered from 0, so there are no more of them than ranks.
            is_on_RM = (node_R[:, None] == r_R[None, :]) & (visited_R > 0)[:, None]
            tl.atomic_add(visits, tl.sum(visited_R, 0).to(tl.int64), sem="relaxed")
            tl.atomic_add(visits + 1, tl.sum(tl.max(is_on_RM.to(tl.int32), 0), 0).to(tl.int64), sem="relaxed")


@triton.jit
def settle_kernel(
    prices, after, shares, rows, row_price, step_gain, limit, NUM_RANKS: tl.constexpr, RANKS: tl.constexpr
):
    """The prices after the step, from the rows that it sent; the rows are taken back to 0 for the next launch."""
    r_R = tl.arange(0, RANKS)
    is_rank_R = r_R < NUM_RANKS
    rows_R = tl.load(rows + r_R, mask=is_rank_R, other=0).to(tl.float64)
    share_R = tl.load(shares + r_R, mask=is_rank_R, other=0.0)
    price_R = tl.load(prices + r_R, mask=is_rank_R, other=0.0)
    num_rows = tl.sum(rows_R, 0)
    rate = tl.minimum(row_price, step_gain * NUM_RANKS / tl.maximum(num_rows, 1.0))
    price_R = tl.maximum(price_R + rate * (rows_R - num_rows * share_R), 0.0)
    beyond = tl.maximum(tl.sum(price_R, 0) - limit * NUM_RANKS, 0.0)
    num_priced = tl.sum((price_R > 0).to(tl.float64), 0)
    price_R = tl.maximum(price_R - beyond / tl.maximum(num_priced, 1.0), 0.0)
    tl.store(after + r_R, price_R, mask=is_rank_R)
    tl.store(rows + r_R, tl.zeros((RANKS,), tl.int64), mask=is_rank_R)
