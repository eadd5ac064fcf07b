"""The merge of routing statistics, and the loads made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expertmesh.balancer.loads import balancedness, view_loads
from expertmesh.balancer.statistics import LayerCounts, Statistics
from expertmesh.v1 import mesh_pb2

E = 4
MODEL = mesh_pb2.ModelShape(num_experts=E, moe_layers=[0, 2])
HALF_LIFE = 1000


def stats(tokens: int, load: list[int], layer: int = 0, **fields: Any) -> mesh_pb2.LayerStats:
    made: dict[str, Any] = {
        "version": 1,
        "coactivation": [tokens, 0, 0, 0, 0, 2 * tokens],
        "visit_tokens": tokens,
        "rank_visits": 2 * tokens,
        "node_visits": tokens,
        "slot_load": [tokens, 3 * tokens],
    }
    return mesh_pb2.LayerStats(layer=layer, tokens=tokens, load=load, **{**made, **fields})


def report(sequence: int, *layers: mesh_pb2.LayerStats, view: int = 1) -> mesh_pb2.StatsReport:
    return mesh_pb2.StatsReport(sequence=sequence, view_number=view, layers=layers)


def layer_of(made: Statistics, layer: int = 0) -> LayerCounts:
    counts = made.layer(layer)
    assert counts is not None
    return counts


def test_reports_add_up_over_sources() -> None:
    made = Statistics(10**9)
    assert made.layer(0) is None
    assert made.layer_statistics(0) is None
    made.merge("a0", "i0", report(1, stats(10, [10, 0, 0, 10]), stats(10, [5, 5, 5, 5], layer=2)), MODEL)
    made.merge("a1", "i1", report(1, stats(30, [0, 30, 30, 0])), MODEL)
    counts = layer_of(made)
    np.testing.assert_allclose(counts.load_E, [10, 30, 30, 10], rtol=1e-6)
    np.testing.assert_allclose(
        counts.coactivation_EE, [[0, 40, 0, 0], [40, 0, 0, 0], [0, 0, 0, 80], [0, 0, 80, 0]], rtol=1e-6
    )
    assert counts.tokens == pytest.approx(40)
    assert [counts.visits.rank_visits, counts.visits.node_visits] == pytest.approx([80, 40])
    np.testing.assert_allclose(counts.sources["a1"], [0, 30, 30, 0], rtol=1e-6)
    assert (made.tokens_seen(0), made.tokens_seen(2), made.version) == (40, 10, 2)
    asked = made.layer_statistics(0)
    assert asked is not None
    assert asked.coactivation_EE is not None
    np.testing.assert_array_equal(asked.load_E, counts.load_E)
    np.testing.assert_array_equal(asked.coactivation_EE, counts.coactivation_EE)
    assert asked.sources.keys() == {"a0", "a1"}
    np.testing.assert_allclose(asked.sources["a0"], [10, 0, 0, 10], rtol=1e-6)


def test_a_report_that_comes_again_does_not_count() -> None:
    made = Statistics(HALF_LIFE)
    assert made.merge("a0", "i0", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    assert not made.merge("a0", "i0", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    assert made.merge("a0", "i0", report(2, stats(10, [10, 10, 0, 0])), MODEL)
    assert made.tokens_seen(0) == 20
    assert made.merge("a0", "restarted", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    assert (made.tokens_seen(0), made.version) == (30, 3)


def test_a_tokens_weight_halves_over_the_half_life() -> None:
    made = Statistics(HALF_LIFE)
    made.merge("a0", "i", report(1, stats(1, [100, 0, 0, 0])), MODEL)
    before = layer_of(made).load_E[0]
    made.merge("a0", "i", report(2, stats(HALF_LIFE, [0, 0, 0, 50])), MODEL)
    assert layer_of(made).load_E[0] == pytest.approx(before / 2)


def test_it_does_not_matter_how_tokens_are_cut_into_reports() -> None:
    whole, parts = Statistics(HALF_LIFE), Statistics(HALF_LIFE)
    whole.merge("a0", "i", report(1, stats(3000, [3000, 6000, 0, 3000])), MODEL)
    for sequence in range(1, 31):
        parts.merge("a0", "i", report(sequence, stats(100, [100, 200, 0, 100])), MODEL)
    np.testing.assert_allclose(layer_of(whole).load_E, layer_of(parts).load_E, rtol=1e-9)
    assert layer_of(whole).tokens == pytest.approx(layer_of(parts).tokens)
    assert layer_of(whole).visits.tokens == pytest.approx(layer_of(parts).visits.tokens)


def test_what_a_source_that_left_has_reported_fades() -> None:
    made = Statistics(HALF_LIFE)
    made.merge("gone", "i", report(1, stats(2000, [2000, 0, 0, 0])), MODEL)
    made.merge("a0", "i", report(1, stats(2000, [0, 0, 2000, 0])), MODEL)
    counts = layer_of(made)
    np.testing.assert_allclose(counts.sources["gone"] + counts.sources["a0"], counts.load_E)
    assert 0 < counts.load_E[0] < counts.load_E[2] / 2
    for sequence in range(2, 20):
        made.merge("a0", "i", report(sequence, stats(2000, [0, 0, 2000, 0])), MODEL)
    assert list(layer_of(made).sources) == ["a0"]
    assert layer_of(made).load_E[0] < 0.01


def test_visits_count_under_the_newest_placement_only() -> None:
    made = Statistics(10**9)
    made.merge("a0", "i", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    made.merge("a0", "i", report(2, stats(4, [4, 4, 0, 0], version=2, rank_visits=4, slot_load=[1, 2, 3])), MODEL)
    made.merge("a1", "i", report(1, stats(10, [10, 10, 0, 0])), MODEL)  # has not switched yet
    visits = layer_of(made).visits
    assert [visits.version, visits.tokens, visits.rank_visits] == pytest.approx([2, 4, 4])
    np.testing.assert_allclose(visits.slot_load_G, [1, 2, 3], rtol=1e-6)
    assert made.tokens_seen(0) == 24
    made.merge("a0", "i", report(3, stats(7, [7, 7, 0, 0], version=2), view=2), MODEL)
    visits = layer_of(made).visits
    assert [visits.view_number, visits.tokens] == pytest.approx([2, 7])
    made.merge("a1", "i", report(2, stats(1, [1, 1, 0, 0], version=2, slot_load=[1]), view=2), MODEL)
    assert layer_of(made).visits.tokens == pytest.approx(7)  # not of this view's size: no visits


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (stats(1, [1, 1, 0, 0], layer=1), "layer 1 is no MoE layer"),
        (stats(1, [1, 1, 0]), "3 loads"),
        (stats(1, [1, 1, 0, 0], coactivation=[1]), "1 pairs"),
    ],
)
def test_a_report_of_another_model_is_refused_as_a_whole(layer: mesh_pb2.LayerStats, words: str) -> None:
    made = Statistics(HALF_LIFE)
    made.merge("a0", "i", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    with pytest.raises(ValueError, match=words):
        made.merge("a0", "i", report(2, stats(5, [5, 5, 0, 0], layer=2), layer), MODEL)
    assert (made.tokens_seen(0), made.tokens_seen(2), made.version) == (10, 0, 1)


def test_another_model_begins_anew() -> None:
    made = Statistics(HALF_LIFE)
    made.merge("a0", "i", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    other = mesh_pb2.ModelShape(num_experts=2, moe_layers=[0])
    made.merge("a0", "j", report(1, stats(5, [5, 5], coactivation=[5])), other)
    assert (made.tokens_seen(0), len(layer_of(made).load_E)) == (5, 2)


def test_a_snapshot_keeps_still() -> None:
    made = Statistics(HALF_LIFE)
    made.merge("a0", "i", report(1, stats(10, [10, 10, 0, 0])), MODEL)
    counts = layer_of(made)
    before = counts.load_E.copy(), counts.coactivation_EE.copy(), counts.visits.slot_load_G.copy()
    made.merge("a0", "i", report(2, stats(10, [10, 10, 0, 0])), MODEL)
    for array, old in zip((counts.load_E, counts.coactivation_EE, counts.visits.slot_load_G), before, strict=True):
        np.testing.assert_array_equal(array, old)


def view(**placement: Any) -> mesh_pb2.View:
    """Two expert ranks of three slots."""
    made = {"layer": 0, "version": 1, "slots": [0, 1, -1, 2, 3, 0], **placement}
    ranks = [mesh_pb2.Rank(rank=0, server_id="a0", role=mesh_pb2.ROLE_ATTENTION)]
    ranks += [mesh_pb2.Rank(rank=1 + i, server_id=f"e{i}", role=mesh_pb2.ROLE_EXPERT) for i in range(2)]
    return mesh_pb2.View(number=1, ranks=ranks, slots_per_rank=3, placement=[mesh_pb2.LayerPlacement(**made)])


def test_loads_as_measured() -> None:
    made = Statistics(10**12)
    made.merge("a0", "i", report(1, stats(10, [8, 2, 6, 4], rank_visits=15, slot_load=[3, 2, 0, 6, 4, 5])), MODEL)
    loads = view_loads(view(), E, made)
    assert list(loads.expert_servers) == ["e0", "e1"]
    (layer,) = loads.layers
    assert list(layer.load) == pytest.approx([8, 2, 6, 4])
    assert list(layer.rank_load) == pytest.approx([5, 15])
    assert layer.balancedness == pytest.approx(10 / 15)
    assert [layer.fanout_ranks, layer.fanout_nodes] == pytest.approx([1.5, 1.0])
    assert layer.tokens == pytest.approx(10)


def test_loads_as_expected_until_a_placement_was_measured() -> None:
    made = Statistics(10**12)
    made.merge("a0", "i", report(1, stats(10, [8, 2, 6, 4], slot_load=[3, 2, 0, 6, 4, 5])), MODEL)
    (layer,) = view_loads(view(version=2), E, made).layers
    assert list(layer.rank_load) == pytest.approx([6, 14])
    assert (layer.fanout_ranks, layer.fanout_nodes) == (0, 0)


def test_loads_without_statistics() -> None:
    (layer,) = view_loads(view(), E, Statistics(HALF_LIFE)).layers
    assert (list(layer.load), list(layer.rank_load), layer.balancedness, layer.tokens) == ([0] * E, [0, 0], 1.0, 0)
    assert balancedness(np.array([1.0, 3.0])) == pytest.approx(2 / 3)
