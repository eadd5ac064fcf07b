"""When sources get quotas, and which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from expertmesh.balancer.policy import LayerStatistics, Layout, Prediction, Proposal
from expertmesh.balancer.source_quotas import LEAST_ROWS, quota_messages, quotas_of, with_quotas
from expertmesh.cli.admin import placement_as_dict
from expertmesh.v1 import admin_pb2, mesh_pb2

LAYOUT = Layout(
    width=3,
    room_R=(3, 3),
    node_R=("n1", "n2"),
    server_R=("b1", "e2"),
    sources={"b1": "n1", "a2": "n2", "a3": "n3"},
)
SLOTS = (0, 1, 2, 1, 2, 3)
HERE = Prediction(balancedness=0.9, fanout_ranks=1.5, fanout_nodes=1.2)
NOTHING = Proposal(slots=SLOTS, before=HERE, after=HERE, gain=0.0, noise=0.0, worthwhile=False, num_loads=0)


def statistics(**rows: float) -> LayerStatistics:
    """Server id → its rows, spread equally over 4 experts."""
    sources = {server: np.full(4, count / 4) for server, count in rows.items()}
    load_E = np.sum([*sources.values(), np.full(4, 1.0)], axis=0)
    return LayerStatistics(tokens=float(load_E.sum()) / 2, load_E=load_E, coactivation_EE=None, sources=sources)


def test_nothing_changes_while_no_source_of_the_view_is_known() -> None:
    for counts in (statistics(), statistics(gone=1e5), statistics(a2=LEAST_ROWS / 2)):
        assert with_quotas(NOTHING, counts, LAYOUT, SLOTS, {}) == NOTHING


def test_nearness_is_worth_a_version_that_loads_nothing_once() -> None:
    counts = statistics(b1=1e5, a2=1e5, gone=1e5)
    found = with_quotas(NOTHING, counts, LAYOUT, SLOTS, {})
    assert found.worthwhile
    assert (found.slots, found.num_loads) == (SLOTS, 0)
    assert found.gain > 0.1
    assert found.quotas.keys() == {"b1", "a2"}
    assert found.quotas["b1"][0] > 0.65, "on its own rank"
    assert found.quotas["a2"][1] > 0.65, "on its own node"
    assert np.sum([*found.quotas.values()], axis=0) == pytest.approx([1.0, 1.0], abs=0.01)
    assert with_quotas(NOTHING, counts, LAYOUT, SLOTS, found.quotas) == NOTHING


def test_a_source_whose_part_grows_is_a_reason_for_other_quotas() -> None:
    before = with_quotas(NOTHING, statistics(b1=1e5, a2=1e5), LAYOUT, SLOTS, {}).quotas
    found = with_quotas(NOTHING, statistics(b1=1.7e5, a2=0.3e5), LAYOUT, SLOTS, before)
    assert found.worthwhile
    assert found.quotas["b1"][0] < before["b1"][0]
    assert found.after.balancedness > found.before.balancedness + 0.1


def test_a_new_placement_comes_with_quotas_of_its_own() -> None:
    moved = replace(NOTHING, slots=(0, 1, 2, 2, 3, -1), worthwhile=True, num_loads=1, gain=0.5)
    found = with_quotas(moved, statistics(b1=1e5, a2=1e5), LAYOUT, SLOTS, {})
    assert replace(found, quotas={}) == moved
    assert found.quotas["b1"] != with_quotas(NOTHING, statistics(b1=1e5, a2=1e5), LAYOUT, SLOTS, {}).quotas["b1"]


def test_a_source_on_a_node_of_its_own_has_its_part_in_the_balance() -> None:
    found = with_quotas(NOTHING, statistics(b1=1e5, a3=1e5), LAYOUT, SLOTS, {})
    assert found.quotas["b1"][0] > 0.65
    assert found.quotas["a3"][1] > 0.65, "what the other one leaves"


def test_a_round_trip_over_the_wire() -> None:
    quotas = {"a1": (0.25, 0.75), "a2": (1.0, 0.0)}
    placement = mesh_pb2.LayerPlacement(slots=[0], source_quotas=quota_messages(quotas))
    assert quotas_of(mesh_pb2.LayerPlacement.FromString(placement.SerializeToString())) == quotas
    assert quotas_of(mesh_pb2.LayerPlacement()) == {}
    shown = placement_as_dict(admin_pb2.GetPlacementResponse(layers=[placement], slot_servers=["e1"]))
    assert shown["layers"][0]["quotas"] == {"a1": [0.25, 0.75], "a2": [1.0, 0.0]}


def test_a_layout_knows_its_sources() -> None:
    view = mesh_pb2.View(slots_per_rank=1)
    for server_id, role in (("a1", mesh_pb2.ROLE_ATTENTION), ("b1", mesh_pb2.ROLE_BOTH), ("e1", mesh_pb2.ROLE_EXPERT)):
        view.ranks.add(server_id=server_id, role=role, node=f"node-of-{server_id}", num_slots=1)
    layout = Layout.of(view)
    assert layout.sources == {"a1": "node-of-a1", "b1": "node-of-b1"}
    assert layout.server_R == ("b1", "e1")
