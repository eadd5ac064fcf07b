"""Who may be asked to leave, and what the mesh does then."""

from __future__ import annotations

import grpc
import pytest

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.draining import Draining
from expertmesh.balancer.refusal import RefusedError
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World


def ask(world: World, server_id: str, *, force: bool = False) -> None:
    draining = Draining(world.actual, world.effects, world.events, world.targets)
    draining.request(admin_pb2.DrainRequest(server_id=server_id, force=force))


def refusal(world: World, server_id: str) -> RefusedError:
    with pytest.raises(RefusedError) as refused:
        ask(world, server_id)
    return refused.value


def test_the_server_hears_it_and_the_view_stays_until_it_leaves() -> None:
    world = World(config(attention=2, experts=2))
    world.form("a1", "a2", "e1", "e2", "r1")
    ask(world, "a2")
    world.advance(1)
    assert len(world.heard("a2", "drain")) == 1
    assert (world.phase, world.view.number, world.ranks) == (Phase.SERVING, 1, ["a1", "a2", "e1", "e2"])
    world.leave("a2")
    world.advance(1)
    assert (world.phase, world.view.number, world.ranks) == (Phase.SERVING, 2, ["a1", "e1", "e2"])
    assert world.effects.published == ["formation", "leave"]
    assert any(event.kind == "drain_asked" and event.subject == "a2" for event in world.events.after(0))


def test_what_cannot_be_done_without_is_kept_unless_forced() -> None:
    world = World(config(attention=1, experts=2))
    world.form("a1", "e1", "e2", "r1")
    assert "last attention server" in refusal(world, "a1").message
    assert "last router" in refusal(world, "r1").message
    ask(world, "e1")  # eight slots hold eight experts
    world.say("e1", leaving=mesh_pb2.Leaving(reason="test"))
    last = refusal(world, "e2")
    assert last.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "room for 0 of the model's 8 experts" in last.message
    assert not world.heard("a1", "drain")
    ask(world, "a1", force=True)
    assert len(world.heard("a1", "drain")) == 1


def test_unknown_and_unreachable_servers() -> None:
    world = World(config(attention=2, experts=2))
    world.form("a1", "a2", "e1", "e2")
    unknown = refusal(world, "e9")
    assert unknown.code == grpc.StatusCode.NOT_FOUND
    assert "'e9' is not in the mesh; it has a1, a2, e1, e2" in unknown.message
    world.disconnect("e2")
    assert refusal(world, "e2").code == grpc.StatusCode.UNAVAILABLE
