"""Placements that administrators ask for: compare-and-set, and everything that is refused."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from expertmesh.balancer.refusal import RefusedError
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

NOW = [0, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1]
WANTED = [4, 1, 2, 3, -1, -1, -1, -1, 0, 5, 6, 7, -1, -1, -1, -1]


@pytest.fixture
def w() -> World:
    made = World(config(layer_updates_per_iter=1))
    made.form("a1", "e1", "e2")
    return made


def request(w: World, **fields: Any) -> admin_pb2.ApplyRequest:
    made = w.wish(0, WANTED)
    made.MergeFrom(admin_pb2.ApplyRequest(**fields))
    return made


def refusal(w: World, asked: admin_pb2.ApplyRequest) -> RefusedError:
    """The request is refused and nothing changes."""
    before = (w.versions(), w.slots(0), w.slots(2), w.view.number, len(w.control.migrations))
    with pytest.raises(RefusedError) as refused:
        w.control.applying.request(asked)
    w.settle()
    assert (w.versions(), w.slots(0), w.slots(2), w.view.number, len(w.control.migrations)) == before
    return refused.value


def test_all_layers_of_a_request_are_migrated_one_after_another(w: World) -> None:
    asked = request(w, layers=[mesh_pb2.LayerPlacement(layer=2, version=1, slots=WANTED)])
    accepted = w.control.applying.request(asked)
    assert [(placement.layer, placement.version) for placement in accepted] == [(0, 2), (2, 2)]
    w.settle()
    assert len(w.control.migrations) == 1
    w.advance(1)
    assert (w.slots(0), w.slots(2)) == (WANTED, WANTED)
    assert "2 of 2 layers change" in w.messages("apply_accepted")[0]
    assert w.agree()


def test_a_layer_that_is_placed_so_already_keeps_its_version(w: World) -> None:
    accepted = w.apply(0, NOW)
    assert [placement.version for placement in accepted] == [1]
    w.advance(1)
    assert w.messages("migration_planned") == []


def test_replicas_and_emptied_slots_are_carried_out(w: World) -> None:
    w.apply(0, [0, 1, 2, 3, 7, 4, -1, -1, 4, 5, 6, 7, 0, 1, 2, 3])
    w.advance(1)
    w.apply(0, [0, 1, 2, 3, -1, -1, -1, 4, -1, 5, 6, 7, 0, -1, -1, -1])
    w.advance(1)
    assert w.versions()[0] == 3
    assert w.agree()


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ([0, 1, 2, -1, *NOW[4:]], "no slot holds expert 3"),
        ([0, 1, 2, 8, *NOW[4:]], "expert 8 is out of range: ids go from 0 to 7"),
        ([0, 1, 2, -2, *NOW[4:]], "expert -2 is out of range"),
        ([0, 1, 2, 3, 3, *NOW[5:]], "e1 holds expert 3 2 times"),
        (NOW[:8], "8 slots are given, there are 16"),
    ],
)
def test_a_table_that_is_no_placement_is_refused(w: World, slots: list[int], reason: str) -> None:
    refused = refusal(w, w.wish(0, slots))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in refused.message
    assert "layer 0" in refused.message


def test_the_room_of_a_server_is_kept() -> None:
    w = World(config())
    w.join("a1", "e1")
    w.form("e2")
    w = World(config())
    w.join("e1", num_slots=4)
    w.form("a1", "e2")
    assert w.view.slots_per_rank == 8
    slots = [0, 1, 2, -1, 3, -1, -1, -1, 4, 5, 6, 7, 3, -1, -1, -1]
    assert "slot 4 of e1 is filled, it has room for 4" in refusal(w, w.wish(0, slots)).message


def test_servers_may_be_named_in_another_order(w: World) -> None:
    asked = w.wish(0, [1, 0, 2, 3, 4, 5, 6, 7, 3])
    asked.slot_servers.extend(["e2", "e1", "e2", "e1", "e2", "e1", "e2", "e1", "e2"])
    w.control.applying.request(asked)
    w.advance(1)
    assert w.slots(0) == [0, 3, 5, 7, -1, -1, -1, -1, 1, 2, 4, 6, 3, -1, -1, -1]
    asked.layers[0].version = 2
    asked.slot_servers[0] = "e9"
    refused = refusal(w, asked)
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "e9 is no expert server of this mesh; it has e1, e2" in refused.message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"fingerprint": "other"}, "made for the model fingerprint other, this mesh runs f"),
        ({"num_experts": 16}, "made for 16 experts a layer, this model has 8"),
        ({"layers": [mesh_pb2.LayerPlacement(layer=1, version=1, slots=NOW)]}, "layer 1 is no MoE layer of m"),
        ({"layers": [mesh_pb2.LayerPlacement(layer=0, version=1, slots=NOW)]}, "a layer is placed twice"),
    ],
)
def test_a_placement_for_something_else_is_refused(w: World, fields: dict[str, Any], reason: str) -> None:
    refused = refusal(w, request(w, **fields))
    assert refused.code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in refused.message
    assert refusal(w, admin_pb2.ApplyRequest(view_number=1)).message == "layers is empty: nothing to apply"


def test_of_two_administrators_exactly_one_wins(w: World) -> None:
    first, second = request(w), w.wish(0, [5, *NOW[1:9], 0, *NOW[10:]])
    w.control.applying.request(first)
    with pytest.raises(RefusedError, match="another placement is being applied"):
        w.control.applying.request(second)
    w.settle()
    assert refusal(w, second).code == grpc.StatusCode.FAILED_PRECONDITION
    assert "a migration of layer 0 runs" in refusal(w, second).message
    w.advance(1)
    late = refusal(w, second)
    assert late.code == grpc.StatusCode.ABORTED
    assert late.message == "layer 0 has version 2, the placement replaces 1"
    assert w.slots(0) == WANTED


def test_a_placement_for_the_view_before_is_refused(w: World) -> None:
    asked = request(w)
    w.join("a2")
    w.advance(1)
    refused = refusal(w, asked)
    assert refused.code == grpc.StatusCode.ABORTED
    assert refused.message == "the mesh is at view 2, the placement was made for view 1"


def test_nothing_is_applied_while_nothing_is_served(w: World) -> None:
    asked = request(w)
    w.leave("a1")
    w.advance(1)
    refused = refusal(w, asked)
    assert refused.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "no attention server" in refused.message
