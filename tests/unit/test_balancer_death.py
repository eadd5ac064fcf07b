"""The reconcile loop, stepped through whole stories: servers that die or hang, and views that break."""

from __future__ import annotations

import pytest

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.door import Over, Welcomed
from support.balancer_parts import config, registration
from support.balancer_world import World


def test_a_broken_stream_alone_changes_nothing_within_the_lease() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.disconnect("e1")
    world.advance(2.5)
    assert world.view.number == 1
    assert isinstance(world.rejoin("e1"), Welcomed)
    world.advance(5)
    assert (world.view.number, world.phase) == (1, Phase.SERVING)
    assert world.heard("e1", "view") == [], "it runs the view already"


def test_a_broken_stream_ends_the_membership_with_the_lease() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.disconnect("e1")
    world.advance(3.3)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])
    assert world.state("e1") == "LOST"
    assert world.effects.published[-1] == "death"


def test_a_killed_server_is_gone_at_once_when_a_rank_reports_the_view_broken() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.disconnect("e1")
    world.report_broken("a1", "e1")
    world.advance(0.1)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])


def test_the_report_may_come_before_the_stream_ends() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.hold("e1", hung=True)
    world.report_broken("a1", "e1")
    world.advance(0.2)
    assert world.view.number == 1, "a suspect gets the chance to show that it lives"
    world.disconnect("e1")
    world.advance(0.1)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])


def test_a_hung_server_is_fenced_when_its_lease_ends_and_rejoins_as_new() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.hold("e1", hung=True)
    world.advance(1)
    world.report_broken("a1", "e1")
    world.advance(1)
    assert world.view.number == 1, "no view is tried with a suspect that is silent"
    world.advance(2)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])
    assert "silent" in world.heard("e1", "fenced")[0].reason
    assert world.servers["e1"].session in world.effects.closed
    zombie = world.rejoin("e1")
    assert isinstance(zombie, Over)
    assert world.heard("e1", "welcome")
    assert world.heard("e1", "fenced")
    world.join("e1", incarnation="2")
    world.advance(1)
    assert (world.view.number, world.ranks) == (3, ["a1", "e1", "e2"])


def test_losing_capacity_pauses_everybody_and_its_return_resumes() -> None:
    world = World(config(experts=2))
    world.join("e1", "e2", num_slots=4)
    world.join("r1")
    world.form("a1")
    world.disconnect("e2")
    world.report_broken("a1", "e2")
    world.advance(0.2)
    assert world.phase is Phase.NONE
    for server_id in ("a1", "e1", "r1"):
        assert "room for 4 of the model's 8 experts" in world.heard(server_id, "pause")[-1].reason
    world.join("e3", num_slots=4)
    world.advance(0.2)
    assert (world.view.number, world.phase) == (2, Phase.SERVING)
    assert world.experts() == {"e1": {0, 1, 2, 3}, "e3": {4, 5, 6, 7}}
    assert world.heard("r1", "view")[-1].number == 2


def test_when_every_server_is_gone_formation_starts_again() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    for server_id in ("a1", "e1", "e2"):
        world.disconnect(server_id)
    world.advance(5)
    assert world.phase is Phase.NONE
    world.join("a1", "e1", incarnation="2")
    world.advance(1)
    assert world.phase is Phase.NONE, "the second expert server is awaited again"
    world.join("e2", incarnation="2")
    world.advance(1)
    assert (world.view.number, world.phase) == (2, Phase.SERVING)


def everybody_dies(world: World, *server_ids: str) -> None:
    """While the balancer is down, too."""
    state = world.effects.saved[-1]
    for server_id in server_ids:
        world.disconnect(server_id)
    world.restart_balancer(state=state)


def test_when_all_died_with_the_balancer_those_who_can_serve_wait_a_lease_for_the_others() -> None:
    world = World(config(attention=1, experts=3, lease_s=3.0, formation_timeout_s=60.0))
    world.form("a1", "e1", "e2", "e3")
    everybody_dies(world, "a1", "e1", "e2", "e3")
    world.advance(4)
    assert world.phase is Phase.NONE
    world.join("e1", incarnation="2")
    world.advance(10)
    assert world.phase is Phase.NONE, "nobody has attention"
    world.join("a9", incarnation="2")
    world.advance(2.9)
    assert world.phase is Phase.NONE
    assert "2 of 3 expert halves" not in world.actual.why_not_serving()
    assert "1 of 3 expert halves" in world.actual.why_not_serving()
    world.advance(0.3)
    assert (world.phase, world.ranks) == (Phase.SERVING, ["a9", "e1"])
    world.join("e2", incarnation="2")
    world.advance(1)
    assert (world.phase, world.ranks) == (Phase.SERVING, ["a9", "e1", "e2"])


def test_when_the_servers_of_the_last_view_are_back_nobody_else_is_awaited() -> None:
    world = World(config(attention=1, experts=3))
    world.form("a1", "e1", "e2", "e3")
    world.leave("e3")
    world.disconnect("e3")
    world.advance(1)
    everybody_dies(world, "a1", "e1", "e2")
    world.join("a1", "e1", "e2", incarnation="2")
    world.advance(0.5)
    assert (world.phase, world.ranks) == (Phase.SERVING, ["a1", "e1", "e2"])


def test_when_all_died_too_few_wait_for_room_however_long() -> None:
    world = World(config(attention=1, experts=2, formation_timeout_s=20.0))
    world.form("a1", "e1", "e2")
    everybody_dies(world, "a1", "e1", "e2")
    world.connect(registration("a1", incarnation="2"))
    world.connect(registration("e1", incarnation="2", num_slots=7))
    world.advance(15)
    assert (world.phase, "1 of 2 expert halves" in world.actual.why_not_serving()) == (Phase.NONE, True)
    world.advance(10)
    assert "room for 7 of the model's 8 experts" in world.actual.why_not_serving()
    world.join("e2", incarnation="2")
    world.advance(1)
    assert world.phase is Phase.SERVING


def test_a_death_while_a_view_forms_makes_the_next_one_at_once() -> None:
    world = World(config())
    world.join("a1", "e1")
    world.connect(registration("e2"))
    world.hold("e2", lazy=True)
    world.advance(0.5)
    assert world.phase is Phase.FORMING
    world.disconnect("e2")
    world.advance(0.1)
    assert (world.view.number, world.ranks) == (2, ["a1", "e1"])


def test_lost_servers_are_shown_for_a_while_and_forgotten() -> None:
    world = World(config(lease_s=3))
    world.form("a1", "e1", "e2")
    world.disconnect("e2")
    world.advance(4)
    assert world.state("e2") == "LOST"
    world.advance(305, step_s=1.0)
    assert world.actual.members.get("e2") is None


# Broken views.


def test_a_broken_view_of_healthy_servers_is_made_anew_ever_more_slowly() -> None:
    world = World(config(settle_s=0.1, lease_s=3))
    world.form("a1", "e1", "e2")
    waits = []
    for number in range(2, 6):
        world.report_broken("e1")
        started = world.now
        while world.view.number < number:
            world.advance(0.02)
        waits.append(world.now - started)
        world.advance(0.5)
        assert world.phase is Phase.SERVING
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8], abs=0.05)
    assert world.effects.published[1:] == ["broken"] * 4
    assert [layer.version for layer in world.view.placement] == [1, 1]


def test_a_server_that_its_peers_name_again_and_again_is_fenced() -> None:
    world = World(config(experts=3))
    world.form("a1", "e1", "e2", "e3")
    for _ in range(3):
        for reporter in ("a1", "e1", "e2"):
            world.report_broken(reporter, "e3")
        world.report_broken("e3", "e1")
        world.advance(2)
    assert world.state("e3") == "LOST"
    assert "server_fenced" in world.kinds()
    assert world.ranks == ["a1", "e1", "e2"]


def test_the_first_to_report_is_not_suspected_for_closing_its_links() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    for _ in range(5):
        world.report_broken("a1")
        for reporter in ("e1", "e2"):
            world.report_broken(reporter, "a1")
        world.advance(2)
    assert "server_fenced" not in world.kinds()


def test_a_mesh_cut_in_halves_fences_nobody() -> None:
    world = World(config(attention=2, experts=2))
    world.form("a1", "a2", "e1", "e2")
    for _ in range(5):
        for reporter, others in (("a1", "2"), ("e1", "2"), ("a2", "1"), ("e2", "1")):
            world.report_broken(reporter, f"a{others}", f"e{others}")
        world.advance(4)
    assert "server_fenced" not in world.kinds()
    assert world.phase is Phase.SERVING


def test_a_rank_that_is_late_for_a_view_is_fenced_and_waits_longer_each_time() -> None:
    world = World(config(experts=3, view_timeout_s=10))
    world.join("a1", "e1", "e2")
    world.connect(registration("e3"))
    world.hold("e3", lazy=True)
    world.advance(11)
    assert (world.view.number, world.ranks, world.phase) == (2, ["a1", "e1", "e2"], Phase.SERVING)
    assert world.heard("e3", "fenced")
    world.connect(registration("e3", incarnation="2"))
    world.hold("e3", lazy=True)
    world.advance(11)
    assert (world.view.number, world.ranks) == (4, ["a1", "e1", "e2"]), "one more chance, taken at once"
    world.connect(registration("e3", incarnation="3"))
    world.advance(5)
    assert world.view.number == 4, "then it waits"
    world.advance(6)
    assert (world.view.number, world.ranks) == (5, ["a1", "e1", "e2", "e3"])


def test_when_no_rank_is_ready_in_time_nobody_is_blamed() -> None:
    world = World(config(view_timeout_s=10))
    for server_id in ("a1", "e1", "e2"):
        world.connect(registration(server_id))
        world.hold(server_id, lazy=True)
    world.advance(11)
    assert (world.view.number, world.phase, len(world.ranks)) == (2, Phase.FORMING, 3)


def test_a_stream_that_comes_back_without_its_view_means_a_broken_view() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.disconnect("e1")
    world.hold("e1", ready=0)
    world.rejoin("e1")
    world.advance(1)
    assert (world.view.number, world.phase) == (2, Phase.SERVING)


def test_a_gpu_rank_may_be_silent_while_it_joins_a_view_but_no_longer() -> None:
    world = World(config(lease_s=3, view_timeout_s=30))
    world.join("a1", "e1", "e2", on_gpu=True)
    for server_id in ("a1", "e1", "e2"):
        world.hold(server_id, hung=True)
    world.advance(20)
    assert (world.view.number, world.phase) == (1, Phase.FORMING), "it compiles kernels"
    for server_id in ("a1", "e1", "e2"):
        world.hold(server_id, hung=False)
    world.advance(1)
    assert (world.view.number, world.phase) == (1, Phase.SERVING)
    world.hold("e1", hung=True)
    world.advance(3.3)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])


def test_a_gpu_rank_that_dies_while_it_joins_a_view_is_gone_at_once() -> None:
    world = World(config(lease_s=3, view_timeout_s=30))
    world.join("a1", "e1", "e2", on_gpu=True)
    world.hold("e1", hung=True)
    world.advance(1)
    assert (world.view.number, world.phase) == (1, Phase.FORMING)
    world.disconnect("e1")
    world.advance(0.2)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])


def test_a_gpu_rank_that_never_joins_is_fenced_when_the_view_is_late() -> None:
    world = World(config(lease_s=3, view_timeout_s=30))
    world.join("a1", "e1", "e2", on_gpu=True)
    world.hold("e1", hung=True)
    world.advance(31)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])
