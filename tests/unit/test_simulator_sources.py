"""Several sources: routed as each rank does it, scored together, nearer and as level with quotas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expertmesh.balancer.simulator.sources import (
    Source,
    quotas_for,
    route_sources,
    score_sources,
    window_balancedness,
)
from expertmesh.balancer.solver import Topology, count_routing, solve_layer
from expertmesh.mesh import placement
from support.routing import topic_tokens

TOPOLOGY = Topology.even(num_slots=48, num_ranks=8, num_nodes=2)
SOURCES = (Source(node=0), Source(node=1))


def test_every_source_is_routed_as_its_rank_does_it() -> None:
    slots = np.array([0, 1, 0, 2, 3, 1, 4, 2], np.int32)
    topology = Topology.even(num_slots=8, num_ranks=4, num_nodes=2)
    topk_STK = [topic_tokens(5, 3, 200, seed=seed) for seed in range(2)]
    share_SR = np.array([[0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3]])
    sources = (Source(node=1), Source(node=0, rank=1))
    found = route_sources(slots, topk_STK, sources, topology, 5, share_SR, step_tokens=16)
    for number, (node, rank) in enumerate(((1, None), (0, 1))):
        where = placement.Topology(slots_per_rank=2, node_R=(0, 0, 1, 1), own_node=node, own_rank=rank, source=number)
        routing = placement.LayerRouting(slots.tolist(), 5, where, quota_R=share_SR[number].tolist())
        expected = routing.choose(torch.from_numpy(topk_STK[number].astype(np.int64))).numpy() // 2
        assert np.array_equal(found[number], expected)


def test_scores_by_hand() -> None:
    topology = Topology.even(num_slots=4, num_ranks=4, num_nodes=2)
    rank_STK = [np.array([[0, 1], [0, 2]]), np.array([[2, 3], [1, 3]])]
    score = score_sources(rank_STK, (Source(node=0), Source()), topology, step_tokens=1, windows=(2,))
    assert (score.ranks, score.nodes) == (2, 1.5)
    assert score.rows_away == pytest.approx((0 + 2 + 1 + 2) / 4)
    assert score.ranks_away == score.rows_away
    assert score.balancedness == 1
    assert score.windows == (1.0,), "steps interleave the sources"
    assert window_balancedness(rank_STK[0], 4, 2) == 0.5


def test_quotas_keep_rows_near_and_sources_that_differ_level() -> None:
    topk_STK = [topic_tokens(32, 4, 20_000, seed=seed) for seed in range(2)]
    train_S, rest_S = [topk_TK[:10_000] for topk_TK in topk_STK], [topk_TK[10_000:] for topk_TK in topk_STK]
    slots = solve_layer(*count_routing(np.concatenate(train_S), 32), TOPOLOGY).slots
    load_SE = np.stack([np.bincount(topk_TK.ravel(), minlength=32).astype(float) for topk_TK in train_S])
    scores = []
    for share_SR in (None, quotas_for(slots, load_SE, SOURCES, TOPOLOGY)):
        rank_S = route_sources(slots, rest_S, SOURCES, TOPOLOGY, 32, share_SR, step_tokens=16)
        scores.append(score_sources(rank_S, SOURCES, TOPOLOGY, step_tokens=16, windows=(256,)))
    equal, quotas = scores
    assert quotas.rows_away < 0.7 * equal.rows_away
    assert quotas.balancedness > equal.balancedness
    assert quotas.balancedness > 0.97
    assert quotas.windows[0] > equal.windows[0] - 0.01
