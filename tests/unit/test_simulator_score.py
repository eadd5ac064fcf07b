"""Replica choice and token-level scores."""

from __future__ import annotations

import numpy as np
import pytest

from expertmesh.balancer.simulator.replica_choice import ReplicaChooser
from expertmesh.balancer.simulator.score import score_locality_first, score_turns
from expertmesh.balancer.solver import Topology, count_routing, solve_layer
from expertmesh.balancer.solver.expected import held_experts, rank_loads
from support.routing import topic_tokens

TOPOLOGY = Topology.even(num_slots=8, num_ranks=4, num_nodes=2)
SLOTS = np.array([0, 1, 0, 2, 3, 1, 4, 2], np.int32)  # ranks {0,1} {0,2} | {3,1} {4,2}


def chooser() -> ReplicaChooser:
    return ReplicaChooser(holds_RE=held_experts(SLOTS.reshape(4, 2), 5), node_R=TOPOLOGY.node_R)


def test_a_replica_follows_the_rank_that_is_visited_anyway() -> None:
    ranks = chooser().choose(np.array([[1, 3], [3, 1], [2, 4], [4, -1]]))
    assert ranks.tolist() == [[2, 2], [2, 2], [3, 3], [3, -1]]


def test_a_replica_follows_the_node_that_is_visited_anyway() -> None:
    ranks = chooser().choose(np.array([[3, 2], [4, 1]]))
    assert ranks.tolist() == [[2, 3], [3, 2]]


def test_two_replicated_experts_meet() -> None:
    for pair in ([0, 1], [1, 0], [0, 2], [2, 0]):
        (ranks,) = chooser().choose(np.array([pair]))
        assert ranks[0] == ranks[1]


def test_every_choice_holds_its_expert_and_repeats() -> None:
    topk_TK = topic_tokens(5, 3, 300, seed=0)
    held_RE = held_experts(SLOTS.reshape(4, 2), 5)
    one, other = chooser(), chooser()
    for start in range(0, 300, 50):
        batch = topk_TK[start : start + 50]
        ranks = one.choose(batch, start)
        assert held_RE[ranks, batch].all()
        assert np.array_equal(ranks, other.choose(batch, start))


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
