"""How many servers there should be: who changes it, what a drain does to it, what survives a restart."""

from __future__ import annotations

import asyncio
import hashlib

import grpc
import pytest

from expertmesh.balancer.draining import Draining
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.scaling_admin import ScaleAdmin
from expertmesh.balancer.state import decode, encode
from expertmesh.mesh.config import parse_config
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

EXPERT = mesh_pb2.ROLE_EXPERT


def admin(world: World) -> ScaleAdmin:
    draining = Draining(world.actual, world.effects, world.events, world.targets)
    return ScaleAdmin(world.targets, draining, policy="off", wake=world.settle)


def wish(world: World, target: int, *, role: mesh_pb2.Role.ValueType = EXPERT, version: int | None = None) -> None:
    number = world.targets.version if version is None else version
    admin(world).set(admin_pb2.SetScaleRequest(version=number, role=role, target=target))


def drain(world: World, server_id: str, *, force: bool = False) -> None:
    admin(world).drain(admin_pb2.DrainRequest(server_id=server_id, force=force))


def of(scale: admin_pb2.Scale) -> dict[str, tuple[int, int, int]]:
    return {mesh_pb2.Role.Name(e.role)[5:].lower(): (e.target, e.servers, e.serving) for e in scale.roles}


def test_the_configuration_is_the_target_until_somebody_changes_it() -> None:
    world = World(config(attention=1, experts=2))
    assert of(world.targets.describe()) == {"attention": (1, 0, 0), "expert": (2, 0, 0)}
    world.form("a1", "e1", "e2")
    wish(world, 3)
    assert of(world.targets.describe()) == {"attention": (1, 1, 1), "expert": (3, 2, 2)}
    world.join("e3")
    assert of(world.targets.describe())["expert"] == (3, 3, 2)
    world.advance(1)
    assert of(world.targets.describe())["expert"] == (3, 3, 3)
    assert world.messages("scale_target") == ["2 → 3 servers, by an administrator"]


def test_two_administrators_at_once_add_one_server() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    seen = world.targets.version
    wish(world, 3, version=seen)
    with pytest.raises(RefusedError, match=r"somebody changed the scale.*a target of 3 expert servers") as refused:
        wish(world, 3, version=seen)
    assert refused.value.code == grpc.StatusCode.ABORTED
    assert world.targets.targets["expert"] == 3


@pytest.mark.parametrize(("role", "target", "why"), [(mesh_pb2.ROLE_ROUTER, 1, "role"), (EXPERT, 5000, "target: 5000")])
def test_nonsense_is_refused(role: mesh_pb2.Role.ValueType, target: int, why: str) -> None:
    world = World(config())
    with pytest.raises(RefusedError, match=why) as refused:
        wish(world, target, role=role)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT


def test_a_target_below_what_is_there_is_a_drains_business_and_a_mistake_can_be_taken_back() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    with pytest.raises(RefusedError, match="2 expert servers are there: drain"):
        wish(world, 1)
    wish(world, 40)
    wish(world, 2)
    assert world.targets.targets["expert"] == 2


def test_a_drain_lowers_the_target_once_however_often_it_is_asked() -> None:
    world = World(config(experts=3))
    world.form("a1", "e1", "e2", "e3")
    drain(world, "e3")
    drain(world, "e3")
    assert len(world.heard("e3", "drain")) == 2
    assert of(world.targets.describe())["expert"] == (2, 2, 2)
    world.leave("e3")
    world.advance(1)
    assert of(world.targets.describe())["expert"] == (2, 2, 2)
    assert world.ranks == ["a1", "e1", "e2"]


def test_those_that_were_asked_to_leave_hold_nothing_together() -> None:
    world = World(config(experts=2))
    world.form("a1", "e1", "e2")
    drain(world, "e1")
    with pytest.raises(RefusedError, match="without e2 there is room for 0"):
        drain(world, "e2")  # e1 has not said yet that it leaves


def test_a_server_that_nobody_asked_for_leaves_without_lowering_the_target() -> None:
    world = World(config(experts=2))
    world.form("a1", "e1", "e2")
    world.join("e3")
    world.advance(1)
    drain(world, "e1")
    assert of(world.targets.describe())["expert"] == (2, 2, 2)


def test_a_restarted_balancer_remembers_and_asks_again() -> None:
    world = World(config(experts=3))
    world.form("a1", "e1", "e2", "e3")
    wish(world, 5)
    drain(world, "e2")
    version = world.targets.version
    world.restart_balancer(state=decode(encode(world.effects.saved[-1])))
    for server_id in ("a1", "e1", "e2", "e3"):
        world.rejoin(server_id)
    world.advance(1)
    assert (world.targets.version, world.targets.targets["expert"]) == (version, 4)
    assert len(world.heard("e2", "drain")) == 1, "the first one may have been lost"
    assert world.heard("e1", "drain") == []
    drain(world, "e2")
    assert world.targets.targets["expert"] == 4, "it was asked before"


def test_a_server_that_was_lost_before_it_could_leave_is_asked_when_it_comes_back() -> None:
    world = World(config(experts=3))
    world.form("a1", "e1", "e2", "e3")
    drain(world, "e3")
    world.hold("e3", hung=True)
    world.advance(5)
    assert world.state("e3") == "LOST"
    world.join("e3", incarnation="2")
    assert len(world.heard("e3", "drain")) == 1
    assert of(world.targets.describe())["expert"] == (2, 2, 2), "and lowers the target no further"
    world.leave("e3")
    world.disconnect("e3")
    world.join("e3", incarnation="3")
    assert world.heard("e3", "drain") == [], "it had left: this is another one"


def test_a_changed_configuration_holds_again() -> None:
    world = World(config(experts=3))
    world.form("a1", "e1", "e2", "e3")
    wish(world, 5)
    version = world.targets.version
    world.config = config(experts=4)
    world.restart_balancer()
    assert (world.targets.version, world.targets.targets["expert"]) == (version + 1, 4)


def test_formation_waits_for_the_target() -> None:
    world = World(parse_config({"attention": {"servers": 1}, "expert": {"servers": 2}}))
    wish(world, 3)
    world.join("a1", "e1", "e2")
    world.advance(1)
    assert "2 of 3 expert halves" in world.actual.why_not_serving()
    world.join("e3")
    world.advance(1)
    assert world.actual.why_not_serving() == ""


async def test_who_watches_hears_of_every_change_and_is_shown() -> None:
    world = World(config(attention=1, experts=2))
    world.form("a1", "e1", "e2")
    desk = admin(world)
    watch = desk.watch("a launcher")
    async with asyncio.timeout(5):
        assert of(await anext(watch))["expert"] == (2, 2, 2)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0)
        assert not following.done()
        desk.set(admin_pb2.SetScaleRequest(version=world.targets.version, role=EXPERT, target=3))
        assert of(await following)["expert"] == (3, 2, 2)
        status = admin_pb2.GetStatusResponse()
        desk.describe(status)
        assert (list(status.launchers), of(status.scale)["expert"]) == (["a launcher"], (3, 2, 2))
        await watch.aclose()
    status = admin_pb2.GetStatusResponse()
    desk.describe(status)
    assert list(status.launchers) == []


def test_the_state_of_a_version_without_scaling_loads() -> None:
    world = World(config(experts=2))
    state = world.actual.durable()
    assert decode(encode(state)).scale == state.scale
    without = encode(state).replace(b'"scale":', b'"other":')
    body = without.partition(b"\n")[2].removesuffix(b"\n")
    assert decode(hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n").scale is None
