"""The reconcile loop, stepped through whole stories: a balancer that stood still, restarts or lost its state."""

from __future__ import annotations

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.door import Over, Refused
from support.balancer_parts import config, registration
from support.balancer_world import World


def test_a_balancer_that_stood_still_fences_nobody() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.now += 20
    world.settle()
    world.advance(1)
    assert (world.view.number, world.phase) == (1, Phase.SERVING)


def test_a_restarted_balancer_adopts_the_mesh_without_a_new_view() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2", "r1")
    placement = list(world.view.placement)
    world.restart_balancer(down_s=30)
    assert world.phase is Phase.ADOPTING
    for server_id in ("e2", "a1", "r1", "e1"):
        world.rejoin(server_id)
        world.advance(0.2)
    assert (world.view.number, world.phase) == (1, Phase.SERVING)
    assert list(world.view.placement) == placement
    assert all(world.heard(server_id, "view") == [] for server_id in ("a1", "e1", "e2"))
    world.advance(10)
    assert (world.view.number, world.effects.published) == (1, ["formation"])
    assert world.actual.mesh_id == "m"


def test_a_restarted_balancer_refuses_another_model_before_its_servers_are_back() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.restart_balancer()
    assert isinstance(world.connect(registration("e9", fingerprint="other")), Refused)


def test_a_rank_missing_after_a_restart_is_awaited_for_a_lease() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.restart_balancer()
    world.rejoin("a1")
    world.rejoin("e1")
    world.advance(2.5)
    assert world.phase is Phase.ADOPTING
    world.advance(1)
    assert (world.view.number, world.ranks, world.phase) == (2, ["a1", "e1"], Phase.SERVING)
    assert isinstance(world.rejoin("e2"), Over), "it comes too late, and as a zombie"


def test_a_view_that_broke_while_the_balancer_was_away_is_replaced_at_once() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.restart_balancer()
    for server_id in ("a1", "e1"):
        world.hold(server_id, ready=0)
        world.rejoin(server_id)
        world.report_broken(server_id, "e2")
    world.advance(0.2)
    assert (world.view.number, world.ranks) == (2, ["a1", "e1"])


def test_a_balancer_without_state_adopts_the_view_that_servers_bring() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.join("a2")
    world.advance(1)
    assert world.view.number == 2
    view = world.view
    empty = World(config()).actual.durable()
    world.restart_balancer(state=empty)
    for server_id in ("a1", "a2", "e1", "e2"):
        world.rejoin(server_id)
    world.advance(1)
    assert world.view == view
    assert world.phase is Phase.SERVING


def test_an_older_state_gives_way_to_the_newer_view_that_servers_bring() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    old_state = world.effects.saved[-1]
    world.join("a2")
    world.advance(1)
    view = world.view
    world.restart_balancer(state=old_state)
    for server_id in ("a1", "a2", "e1", "e2"):
        world.rejoin(server_id)
    world.advance(1)
    assert world.view == view
    assert world.phase is Phase.SERVING


def test_a_whole_mesh_started_anew_on_an_old_state_forms_at_once_under_a_new_number() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.restart_balancer()
    world.join("a1", "e1", "e2", incarnation="2")
    world.advance(0.2)
    assert (world.view.number, world.phase) == (2, Phase.SERVING)


def test_the_number_of_a_view_is_never_used_twice() -> None:
    world = World(config())
    world.connect(registration("e1", view_number=9))
    world.form("a1", "e2", "e3")
    assert world.view.number == 10
