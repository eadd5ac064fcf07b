"""Which replica of each chosen expert a token goes to, on the CPU.

An online form of Lagrangian prices (drift plus penalty, as in M. Neely, "Stochastic Network Optimization", 2010): a
token pays for the ranks and nodes that it visits and the prices of its ranks, and prices follow the load token by
token. So they do not depend on how tokens are cut into steps.

Dimensions: T tokens, K experts a token, E experts of the layer, W most ranks that one of them is on, R expert ranks,
N nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expertmesh.kernels.compiled import compiled
from expertmesh.kernels.replica_costs import MEAN_PRICE_LIMIT, NODE_COST, RANK_COST, ROW_PRICE

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@compiled
def host_choose_replicas(
    expert_TK: Ints,
    slot_EW: Ints,
    rank_EW: Ints,
    node_R: Ints,
    own_rank: int,
    own_node: int,
    share_R: Floats,
    price_R: Floats,
    after_R: Floats,
    slot_TK: Ints,
) -> None:
    """Global slots into ``slot_TK``, the prices after these tokens into ``after_R``. An expert of -1 gets slot -1.

    Args:
        expert_TK: below E; distinct in a token.
        slot_EW, rank_EW: where the expert's replicas are, on different ranks; -1 behind the last one. W is 2 or more.
        node_R: from 0.
        own_rank, own_node: visits to them cost nothing; -1 = none.
        share_R: of the rows, that prices lead to in the long run; they add up to 1.
    """
    num_tokens, top_k = expert_TK.shape
    after_R[:] = price_R
    visited_R, visited_N = np.zeros(len(price_R), np.bool_), np.zeros(max(int(node_R.max()), own_node) + 1, np.bool_)
    reach_R, is_open_K = np.zeros(len(price_R), np.int64), np.zeros(top_k, np.bool_)
    for token in range(num_tokens):
        expert_K, slot_K = expert_TK[token], slot_TK[token]
        visited_R[:] = False
        visited_N[:] = False
        reach_R[:] = 0
        if own_rank >= 0:
            visited_R[own_rank] = True
        if own_node >= 0:
            visited_N[own_node] = True
        left = 0
        for k in range(top_k):
            expert = expert_K[k]
            is_open_K[k] = expert >= 0 and rank_EW[expert, 1] >= 0
            if is_open_K[k]:
                _reach(rank_EW[expert], reach_R, 1)
                left += 1
            elif expert >= 0:
                _take(slot_EW[expert, 0], rank_EW[expert, 0], k, slot_K, node_R, visited_R, visited_N, after_R)
            else:
                slot_K[k] = -1
        for _ in range(left):
            k, w = _cheapest(expert_K, is_open_K, rank_EW, node_R, visited_R, visited_N, reach_R, after_R)
            expert = expert_K[k]
            _take(slot_EW[expert, w], rank_EW[expert, w], k, slot_K, node_R, visited_R, visited_N, after_R)
            _reach(rank_EW[expert], reach_R, -1)
            is_open_K[k] = False
        _relax(after_R, share_R, slot_K)


@compiled
def _reach(rank_W: Ints, reach_R: Ints, change: int) -> None:
    """One more or less of the token's open choices could go to these ranks."""
    for rank in rank_W:
        if rank < 0:
            break
        reach_R[rank] += change


@compiled
def _take(
    slot: int, rank: int, k: int, slot_K: Ints, node_R: Ints, visited_R: Flags, visited_N: Flags, after_R: Floats
) -> None:
    slot_K[k] = slot
    visited_R[rank] = True
    visited_N[node_R[rank]] = True
    after_R[rank] += ROW_PRICE


@compiled
def _cheapest(
    expert_K: Ints,
    is_open_K: Flags,
    rank_EW: Ints,
    node_R: Ints,
    visited_R: Flags,
    visited_N: Flags,
    reach_R: Ints,
    price_R: Floats,
) -> tuple[int, int]:
    """The open choice and the replica that cost least; all choices that could go to a new rank share its cost."""
    best, best_k, best_w = np.inf, 0, 0
    for k in range(len(expert_K)):
        if not is_open_K[k]:
            continue
        expert = expert_K[k]
        for w in range(rank_EW.shape[1]):
            rank = rank_EW[expert, w]
            if rank < 0:
                break
            cost = price_R[rank]
            if not visited_R[rank]:
                visit = RANK_COST if visited_N[node_R[rank]] else RANK_COST + NODE_COST
                cost += visit / reach_R[rank]
            if cost < best:
                best, best_k, best_w = cost, k, w
    return best_k, best_w


@compiled
def _relax(price_R: Floats, share_R: Floats, slot_K: Ints) -> None:
    """After a token every price falls by the rank's share of what its rows raised; none falls below 0.

    What is then above the limit is taken off all ranks equally, so that their differences stay.
    """
    num_rows = 0
    for slot in slot_K:
        num_rows += slot >= 0
    fall, total, num_priced = ROW_PRICE * num_rows, 0.0, 0
    for rank in range(len(price_R)):
        price_R[rank] = max(price_R[rank] - fall * share_R[rank], 0.0)
        total += price_R[rank]
        num_priced += price_R[rank] > 0
    beyond = total - MEAN_PRICE_LIMIT * len(price_R)
    if beyond > 0:
        for rank in range(len(price_R)):
            price_R[rank] = max(price_R[rank] - beyond / num_priced, 0.0)
