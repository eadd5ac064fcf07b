"""Replica choice and token-level scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from expertmesh.balancer.simulator.score import route_locality_first, score_locality_first, score_turns, tally
from expertmesh.balancer.solver import Topology, count_routing, solve_layer
from expertmesh.balancer.solver.expected import rank_loads
from expertmesh.mesh import placement
from support.routing import topic_tokens

TOPOLOGY = Topology.even(num_slots=8, num_ranks=4, num_nodes=2)
SLOTS = np.array([0, 1, 0, 2, 3, 1, 4, 2], np.int32)  # ranks {0,1} {0,2} | {3,1} {4,2}


def route(topk_TK: NDArray[np.integer], step_tokens: int = 512, sources: int = 1) -> NDArray[np.integer]:
    none_TK = np.empty((0, topk_TK.shape[1]), np.int16)
    return route_locality_first(SLOTS, topk_TK, TOPOLOGY, 5, none_TK, sources=sources, step_tokens=step_tokens)


def test_replicas_follow_what_is_visited_anyway() -> None:
    assert route(np.array([[1, 3], [3, 1], [2, 4], [4, -1]])).tolist() == [[2, 2], [2, 2], [3, 3], [3, -1]]
    assert route(np.array([[3, 2], [4, 1]])).tolist() == [[2, 3], [3, 2]]


def test_replicas_are_chosen_as_an_attention_rank_does() -> None:
    topk_TK = topic_tokens(5, 3, 300, seed=0).astype(np.int64)
    where = placement.Topology(slots_per_rank=2, node_R=(0, 0, 1, 1))
    routing = placement.LayerRouting(SLOTS.tolist(), 5, where)
    expected = []
    for start in range(0, 300, 50):
        expected.append(routing.choose(torch.from_numpy(topk_TK[start : start + 50])).numpy() // 2)
        routing.commit()
    assert np.array_equal(route(topk_TK, step_tokens=50), np.concatenate(expected))


def test_the_warm_up_is_routed_before_and_left_out() -> None:
    topk_TK = topic_tokens(5, 3, 300, seed=0)
    later = route_locality_first(SLOTS, topk_TK[100:], TOPOLOGY, 5, topk_TK[:100])
    assert np.array_equal(later, route(topk_TK)[100:])
    assert not np.array_equal(later, route(topk_TK[100:]))


def test_sources_that_know_nothing_of_each_other_are_level_together() -> None:
    topk_TK = topic_tokens(32, 4, 40_000, seed=4)
    topology = Topology.even(num_slots=48, num_ranks=8, num_nodes=2)
    slots = solve_layer(*count_routing(topk_TK[:20_000], 32), topology).slots
    balanced = []
    for sources in (1, 8):
        rank_TK = route_locality_first(
            slots, topk_TK[20_000:], topology, 32, topk_TK[:20_000], sources=sources, step_tokens=8
        )
        balanced.append(tally(rank_TK, topology).balancedness)
    assert balanced[1] > max(0.95, balanced[0] - 0.02)


def test_a_placement_without_replicas_leaves_no_choice() -> None:
    slots = np.array([0, 1, 2, 3, 4, -1, -1, -1], np.int32)
    rank_TK = route_locality_first(slots, np.array([[4, 0, -1], [3, 2, 1]]), TOPOLOGY, 5, np.empty((0, 3), np.int16))
    assert rank_TK.tolist() == [[2, 0, -1], [1, 1, 0]]


def test_prices_level_the_load() -> None:
    topk_TK = topic_tokens(32, 4, 40_000, seed=4)
    topology = Topology.even(num_slots=48, num_ranks=8, num_nodes=2)
    load_E, pair_EE = count_routing(topk_TK[:20_000], 32)
    slots = solve_layer(load_E, pair_EE, topology).slots
    first = score_locality_first(slots, topk_TK[20_000:], topology, 32, topk_TK[:20_000])
    turns = score_turns(slots, topk_TK[20_000:], topology)
    assert first.balancedness > 0.96
    assert first.fanout_ranks is not None
    assert turns.fanout_ranks is not None
    assert first.fanout_ranks < turns.fanout_ranks


def test_turns_split_equally() -> None:
    topk_TK = topic_tokens(5, 3, 1000, seed=1)
    load_E, _ = count_routing(topk_TK, 5)
    score = score_turns(SLOTS, topk_TK, TOPOLOGY)
    assert np.abs(score.load_R - rank_loads(SLOTS.reshape(4, 2), load_E)).max() <= 2
    assert score.load_R.sum() == 3000


def test_fanout_by_hand() -> None:
    topology = Topology.even(num_slots=4, num_ranks=4, num_nodes=2)
    slots = np.arange(4, dtype=np.int32)
    score = score_turns(slots, np.array([[0, 1], [0, 2], [3, -1]], np.int16), topology)
    assert score.fanout_ranks == pytest.approx(5 / 3)
    assert score.fanout_nodes == pytest.approx(4 / 3)
    assert score.load_R.tolist() == [2, 1, 1, 1]
