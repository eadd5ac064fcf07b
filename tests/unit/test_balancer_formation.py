"""The reconcile loop, stepped through whole stories: how views form, and who joins and leaves."""

from __future__ import annotations

from expertmesh.balancer.actual import Phase
from support.balancer_parts import config, registration
from support.balancer_world import World


def test_the_first_view_waits_for_all_configured_servers_and_says_so() -> None:
    world = World(config(attention=1, experts=2))
    world.join("r1", "e2", "a1")
    world.advance(5)
    assert world.view.number == 0
    assert "1 of 1 attention halves and 1 of 2 expert halves" in world.heard("r1", "pause")[-1].reason
    world.join("e1")
    world.advance(1)
    assert world.phase is Phase.SERVING
    assert world.ranks == ["a1", "e1", "e2"]
    assert world.view.number == 1
    assert [rank.rank for rank in world.view.ranks] == [0, 1, 2]
    assert (world.view.slots_per_rank, world.view.store_address) == (8, "127.0.0.1:9")
    assert [layer.layer for layer in world.view.placement] == [0, 2]
    assert [layer.version for layer in world.view.placement] == [1, 1]
    assert world.effects.published == ["formation"]


def test_formation_takes_what_is_there_after_its_time_out() -> None:
    world = World(config(attention=2, experts=3, formation_timeout_s=10))
    world.join("a1", "e1")
    world.advance(9)
    assert world.view.number == 0
    world.advance(2)
    assert world.phase is Phase.SERVING
    assert world.ranks == ["a1", "e1"]


def test_both_ranks_count_for_both_halves_and_come_first() -> None:
    world = World(config(attention=1, experts=1).model_copy(update={"both_servers": 1}))
    world.form("e1", "b1", "a1")
    assert world.ranks == ["a1", "b1", "e1"]


def test_only_ranks_get_the_secret() -> None:
    world = World(config())
    world.form("a1", "e1", "e2", "r1")
    assert world.heard("a1", "view")[0].secret == b"secret-1"
    assert world.heard("r1", "view")[0].secret == b""
    world.join("r2")
    assert world.heard("r2", "view")[0].number == 1, "a router that joins later hears of the view at once"


def test_num_slots_makes_replicas_and_too_little_room_makes_fewer() -> None:
    settings = config(experts=2)
    settings = settings.model_copy(update={"expert": settings.expert.model_copy(update={"num_slots": 16})})
    world = World(settings)
    world.form("a1", "e1", "e2")
    assert world.experts() == {"e1": set(range(8)), "e2": set(range(8))}
    world.disconnect("e2")
    world.report_broken("a1", "e2")
    world.advance(1)
    assert world.experts() == {"e1": set(range(8))}
    assert world.phase is Phase.SERVING


def test_the_status_says_why_nothing_is_served() -> None:
    world = World(config())
    assert "no attention or expert server" in world.actual.why_not_serving()
    world.join("a1", "e1")
    world.connect(registration("e2"))
    world.hold("e2", lazy=True)
    world.advance(0.5)
    assert world.actual.why_not_serving() == "view 1 is forming: waiting for e2"
    assert [world.state(server_id) for server_id in ("a1", "e2")] == ["SERVING", "JOINING"]
    world.hold("e2", lazy=False)
    world.advance(0.1)
    assert world.actual.why_not_serving() == ""


# Joins and leaves.


def test_joins_within_the_settling_time_become_one_view_and_experts_stay() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    before = world.experts()
    world.join("e3")
    world.advance(0.04)
    world.join("a2")
    world.advance(1)
    assert world.view.number == 2
    assert world.ranks == ["a1", "a2", "e1", "e2", "e3"]
    after = world.experts()
    assert after["e1"] < before["e1"]
    assert after["e2"] < before["e2"]
    assert [layer.version for layer in world.view.placement] == [2, 2]
    assert world.effects.published[-1] == "join"


def test_a_join_of_an_attention_server_leaves_the_placement_version() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.join("a2")
    world.advance(1)
    assert (world.view.number, [layer.version for layer in world.view.placement]) == (2, [1, 1])


def test_a_join_waits_while_a_view_forms() -> None:
    world = World(config())
    world.join("a1", "e1")
    world.connect(registration("e2"))
    world.hold("e2", lazy=True)
    world.advance(1)
    assert world.phase is Phase.FORMING
    world.join("e3")
    world.advance(1)
    assert world.view.number == 1
    world.hold("e2", lazy=False)
    world.advance(1)
    assert (world.view.number, world.phase) == (2, Phase.SERVING)


def test_leaving_publishes_a_view_without_the_server_which_hears_of_it() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.leave("e1")
    assert world.state("e1") == "DRAINING"
    world.advance(0.2)
    assert (world.view.number, world.ranks) == (2, ["a1", "e2"])
    assert [view.number for view in world.heard("e1", "view")] == [1, 2]
    assert world.heard("e1", "view")[-1].secret == b""
    world.disconnect("e1")
    assert world.actual.members.get("e1") is None
    assert "server_left" in world.kinds()
    assert "server_lost" not in world.kinds()
    assert world.effects.published[-1] == "leave"


def test_the_last_attention_server_leaving_pauses_and_a_new_one_resumes() -> None:
    world = World(config())
    world.form("a1", "e1", "e2")
    world.leave("a1")
    world.advance(0.2)
    assert "no attention server" in world.heard("a1", "pause")[-1].reason
    world.disconnect("a1")
    world.join("a2")
    world.advance(1)
    assert (world.phase, world.ranks) == (Phase.SERVING, ["a2", "e1", "e2"])
