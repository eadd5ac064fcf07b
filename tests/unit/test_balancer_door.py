"""The reconcile loop, stepped through whole stories: whom the door refuses and whom it takes for another."""

from __future__ import annotations

import grpc
import pytest

from expertmesh.balancer.door import Over, Refused, Welcomed
from support.balancer_parts import config, registration
from support.balancer_world import World


def test_another_model_is_refused_and_both_fingerprints_are_named() -> None:
    world = World(config())
    world.join("a1")
    verdict = world.connect(registration("e1", fingerprint="other"))
    assert isinstance(verdict, Refused)
    assert verdict.code == grpc.StatusCode.FAILED_PRECONDITION
    assert "fingerprint other" in verdict.message
    assert "runs f" in verdict.message
    assert world.actual.members.get("e1") is None


def test_a_second_server_of_the_same_name_is_refused_while_the_first_lives() -> None:
    world = World(config(lease_s=3))
    world.join("e1")
    verdict = world.actual.register(77, registration("e1", incarnation="2"), world.now)
    assert isinstance(verdict, Refused)
    assert verdict.code == grpc.StatusCode.ALREADY_EXISTS
    world.disconnect("e1")
    assert isinstance(world.connect(registration("e1", incarnation="2")), Welcomed)
    assert isinstance(world.connect(registration("e1", incarnation="1")), Over), "the old one is fenced"


def test_a_restarted_server_replaces_itself_in_the_view_at_once() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.disconnect("e1")
    world.join("e1", incarnation="2")
    world.advance(0.2)
    assert world.view.number == 2
    assert [rank.incarnation for rank in world.view.ranks] == ["a1#1", "e1#2", "e2#1"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("server_id", ""), ("incarnation", ""), ("role", 0), ("num_slots", 0), ("fingerprint", ""), ("num_slots", 10**6)],
)
def test_a_registration_with_a_mistake_is_refused_by_the_fields_name(field: str, value: object) -> None:
    made = registration("e1")
    setattr(made, field, value)
    verdict = World(config()).actual.register(1, made, 0.0)
    assert isinstance(verdict, Refused)
    assert verdict.code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in verdict.message


def test_a_server_that_keeps_trying_is_one_event() -> None:
    world = World(config())
    world.join("a1")
    for _ in range(5):
        world.connect(registration("e1", fingerprint="other"))
    assert world.kinds().count("server_refused") == 1
