"""What the balancer says and does about the wishes of a scale policy."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.v1 import mesh_pb2
from support.balancer_parts import registration
from support.balancer_world import World

MAX_REQUESTS = 16


def config(policy: str = "on", **scaling: Any) -> MeshConfig:
    keys = {"policy": policy, "hold_s": 4, "cooldown_s": 4, "interval_s": 1, "max_waiting": 2, **scaling}
    return parse_config({"attention": {"servers": 1}, "expert": {"servers": 2}, "scaling": keys})


def formed(policy: str = "on", launcher: bool = True, **scaling: Any) -> World:
    world = World(config(policy, **scaling))
    world.form("a1", "e1", "e2")
    if launcher:
        world.targets.launchers["test"] += 1
    return world


def load(world: World, running: int, waiting: int, *server_ids: str) -> None:
    made = mesh_pb2.ServerLoad(
        num_requests_running=running, num_requests_waiting=waiting, max_num_requests=MAX_REQUESTS
    )
    for server_id in server_ids:
        world.hold(server_id, load=made)


def test_a_queue_brings_a_server_and_idleness_takes_the_idlest_away() -> None:
    world = formed()
    load(world, 16, 5, "a1")
    world.advance(8)
    assert world.targets.targets["attention"] == 2
    assert world.messages("scale_target") == [
        "1 → 2 servers, by the scale policy (5 requests wait, more than 2 a server)"
    ]
    world.join("a2")
    load(world, 10, 0, "a1", "a2")
    world.advance(20)
    assert world.targets.targets["attention"] == 2, "20 of 32 requests run"
    load(world, 2, 0, "a1")
    load(world, 1, 0, "a2")
    world.advance(8)
    assert len(world.heard("a2", "drain")) == 1
    assert world.heard("a1", "drain") == []
    world.leave("a2")
    world.disconnect("a2")
    world.advance(30)
    assert (world.targets.targets["attention"], world.ranks) == (1, ["a1", "e1", "e2"])
    assert len(world.messages("drain_asked")) == 1


def test_requests_that_wait_on_routers_count() -> None:
    world = formed()
    world.join("r1")
    load(world, 0, 3, "r1")
    world.advance(8)
    assert world.targets.targets["attention"] == 2


def test_a_dry_run_says_once_what_it_would_do() -> None:
    world = formed("dry-run")
    load(world, 16, 5, "a1")
    world.advance(60)
    assert world.messages("scale_wish") == ["would be 1 → 2 servers: 5 requests wait, more than 2 a server"]
    assert world.targets.targets["attention"] == 1
    load(world, 16, 0, "a1")
    world.advance(10)
    load(world, 16, 6, "a1")
    world.advance(20)
    assert len(world.messages("scale_wish")) == 2
    assert world.messages("scale_target") == world.messages("drain_asked") == []


def test_off_looks_at_nothing() -> None:
    world = formed("off", hook="expertmesh.balancer.scaling_policy:default_policy")
    load(world, 16, 50, "a1")
    world.advance(30)
    assert not {"scale_target", "scale_wish"} & set(world.kinds())


def test_without_a_launcher_nothing_is_asked_for() -> None:
    world = formed(launcher=False)
    load(world, 16, 5, "a1")
    world.advance(30)
    assert world.targets.targets["attention"] == 1
    (said,) = world.messages("scale_wish")
    assert said.endswith("no launcher watches that could start one")


def test_a_server_that_does_not_come_is_not_waited_for_for_ever() -> None:
    world = formed()
    load(world, 16, 5, "a1")
    world.advance(8)
    assert world.targets.targets["attention"] == 2
    world.advance(115, step_s=0.2)
    assert world.targets.targets["attention"] == 2
    load(world, 16, 0, "a1")
    world.advance(10, step_s=0.2)
    assert world.targets.targets["attention"] == 1
    assert world.messages("scale_failed") == ["no attention server came within 120 s of being asked for"]


def test_no_server_goes_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("stingy_policy")
    module.answer = lambda snapshot, settings: {"expert": 1}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stingy_policy", module)
    world = World(config(hook="stingy_policy:answer"))
    world.connect(registration("a1"))
    for server_id in ("e1", "e2"):
        world.connect(registration(server_id, num_slots=4))
    world.advance(30)
    assert world.actual.why_not_serving() == ""
    assert world.messages("drain_asked") == []
    assert world.messages("scale_wish") == ["2 → 1 servers: 1 are wished for, of 1 to 8; but none can be spared"]


def test_a_policy_that_fails_is_an_event_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("broken_policy")
    module.answer = lambda snapshot, settings: {"expert": 1 // 0}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_policy", module)
    world = formed(hook="broken_policy:answer")
    world.advance(30)
    assert world.messages("scale_failed") == [
        "the policy failed: ZeroDivisionError: integer division or modulo by zero"
    ]
    assert world.actual.why_not_serving() == ""
