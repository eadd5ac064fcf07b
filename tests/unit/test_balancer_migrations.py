"""Migrations of layers, from the plan to the switch, against ranks that are late, fail, vanish; and a balancer that
dies in every phase."""

from __future__ import annotations

from typing import Any

import pytest

from expertmesh.balancer.actual import Phase
from expertmesh.balancer.state import decode, encode, fresh_state
from expertmesh.v1 import mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

SWAPPED = [4, 1, 2, 3, -1, -1, -1, -1, 0, 5, 6, 7, -1, -1, -1, -1]
"""The first placement of two expert servers, experts 0 and 4 swapped."""


def world(**balancer: Any) -> World:
    made = World(config(migration_timeout_s=10, **balancer))
    made.form("a1", "e1", "e2", "r1")
    return made


def phases(world: World) -> list[str]:
    return [kind.removeprefix("migration_") for kind in world.kinds() if kind.startswith("migration_")]


def test_a_layer_goes_through_all_phases_and_every_rank_ends_with_the_same_version() -> None:
    w = world()
    assert [placement.version for placement in w.apply(0, SWAPPED)] == [2]
    w.advance(1)
    assert phases(w) == ["planned", "staging", "committing", "committed"]
    assert w.versions() == {0: 2, 2: 1}
    assert w.slots(0) == SWAPPED
    assert w.agree()
    assert (w.effects.stages, w.effects.outcomes) == (["planned", "staging", "committing"], ["committed"])
    assert "2 slots to load" in w.messages("migration_committed")[0]
    for server_id in ("a1", "e1", "e2"):
        assert len(w.heard(server_id, "plan")) == len(w.heard(server_id, "commit")) == 1
    assert w.heard("r1", "plan") == [], "routers have nothing to do with it"
    saved = w.effects.saved[-1]
    assert saved.view.placement[0].version == 2
    assert saved.ledger.plans == {}, "nothing is open"


def test_the_plan_says_what_is_loaded_from_where() -> None:
    w = world()
    w.apply(0, SWAPPED)
    plan = w.heard("a1", "plan")[0]
    assert (plan.view_number, plan.placement.version, plan.timeout_s) == (1, 2, 10)
    assert [(t.slot, t.expert, t.source_slot) for t in plan.transfers] == [(0, 4, 8), (8, 0, 0)]


def test_the_commit_waits_for_every_rank() -> None:
    w = world()
    w.hold("e2", slow=True)
    w.apply(0, SWAPPED)
    w.advance(5)
    assert [stage.stage for stage in w.control.migrations] == ["staging"]
    assert w.heard("a1", "commit") == []
    w.hold("e2", slow=False)
    w.advance(0.1)
    assert phases(w)[-1] == "committed"


def test_a_rank_that_fails_aborts_its_layer_alone() -> None:
    w = world(layer_updates_per_iter=2)
    w.hold("e2", slow=True)
    request = w.wish(0, SWAPPED)
    request.layers.add(layer=2, version=1, slots=SWAPPED)
    w.control.applying.request(request)
    w.advance(1)
    first = w.heard("e2", "plan")[0]
    failed = mesh_pb2.MigrationStatus(id=first.id, phase=mesh_pb2.MIGRATION_PHASE_FAILED, reason="no such expert")
    w.say("e2", migration=failed)
    w.settle()
    assert [abort.id for abort in w.heard("a1", "abort")] == [first.id]
    assert "e2 failed: no such expert" in w.messages("migration_aborted")[0]
    w.hold("e2", slow=False)
    w.advance(1)
    assert w.versions() == {0: 1, 2: 2}
    assert (w.slots(2), w.agree()) == (SWAPPED, True)
    assert w.view.number == 1


def test_a_late_rank_aborts_the_migration_and_the_version_is_not_used_again() -> None:
    w = world()
    w.hold("e2", slow=True)
    w.apply(0, SWAPPED)
    w.advance(9.5)
    assert len(w.control.migrations) == 1
    w.advance(1)
    assert "staging took longer than 10 s: nothing from e2" in w.messages("migration_aborted")[0]
    assert w.slots(0) != SWAPPED
    w.hold("e2", slow=False)
    assert [placement.version for placement in w.apply(0, SWAPPED)] == [3]
    w.advance(1)
    assert w.versions()[0] == 3
    assert w.agree()


def test_a_commit_that_one_rank_does_not_hear_is_aborted() -> None:
    w = world()
    w.hold("e2", deaf=True)
    w.apply(0, SWAPPED)
    w.advance(12)
    assert "committing took longer than 10 s" in w.messages("migration_aborted")[0]
    w.hold("e2", deaf=False)
    w.advance(1)
    assert w.versions()[0] == 1
    assert w.agree()


def test_a_switch_that_crosses_the_abort_is_the_truth() -> None:
    w = world()
    w.hold("e2", slow=True)
    w.apply(0, SWAPPED)
    w.advance(11)
    plan = w.heard("a1", "plan")[0]
    committed = mesh_pb2.MigrationStatus(id=plan.id, phase=mesh_pb2.MIGRATION_PHASE_COMMITTED, step=7)
    w.say("a1", migration=committed)
    w.settle()
    assert w.slots(0) == SWAPPED
    assert w.versions()[0] == 2
    assert "placement_adopted" in w.kinds()
    assert w.effects.saved[-1].view.placement[0].version == 2


def test_one_rank_that_switched_proves_that_all_did() -> None:
    w = world()
    w.apply(0, SWAPPED)
    w.advance(0.02)
    w.read()  # the commit
    w.disconnect("e2")
    w.advance(0.02)
    assert w.slots(0) == SWAPPED, "two statuses are enough to know"
    assert phases(w)[-1] == "committing"
    w.hold("e2", unsent=[])
    w.rejoin("e2")
    w.advance(11)
    assert "e2 did not say so" in w.messages("migration_committed")[0]
    assert w.agree()


@pytest.mark.parametrize("after_s", [0.0, 0.02, 0.04, 0.06])
def test_a_stream_that_breaks_in_between_changes_nothing(after_s: float) -> None:
    w = world()
    w.hold("e1", slow=after_s == 0.0)
    w.apply(0, SWAPPED)
    w.advance(after_s)
    w.disconnect("e1")
    w.advance(1)
    w.rejoin("e1")
    w.advance(1)
    assert w.versions()[0] == 2
    assert phases(w)[-1] == "committed"
    assert w.agree()
    assert w.view.number == 1


@pytest.mark.parametrize("hindered", [{"slow": True}, {"deaf": True}])
def test_a_new_view_drops_the_migrations_of_the_old_one(hindered: dict[str, bool]) -> None:
    w = world()
    w.hold("e2", **hindered)
    w.apply(0, SWAPPED)
    w.advance(1)
    w.join("a2")
    w.advance(1)
    assert w.view.number == 2
    assert phases(w)[-1] == "dropped"
    assert w.heard("e1", "abort") == [], "a view's plans end with it"
    assert w.versions() == {0: 3, 2: 1}, "2 may have been the truth somewhere"
    assert w.slots(0) != SWAPPED
    assert w.effects.outcomes == ["dropped"]
    assert w.apply(0, SWAPPED)[0].version == 4


def test_a_view_that_breaks_takes_over_what_ranks_had_switched_to() -> None:
    w = world()
    w.hold("e2", slow=True)
    w.apply(0, SWAPPED)
    w.advance(1)
    plan = w.heard("a1", "plan")[0]
    w.report_broken("e1", "e2")
    w.say("a1", migration=mesh_pb2.MigrationStatus(id=plan.id, phase=mesh_pb2.MIGRATION_PHASE_COMMITTED, step=7))
    w.advance(1)
    assert w.view.number == 2
    assert w.versions()[0] == 2
    assert w.slots(0) == SWAPPED


def test_the_rest_of_an_apply_is_dropped_with_its_view() -> None:
    w = world(layer_updates_per_iter=1)
    w.hold("e2", slow=True)
    request = w.wish(0, SWAPPED)
    request.layers.add(layer=2, version=1, slots=SWAPPED)
    w.control.applying.request(request)
    w.advance(1)
    w.join("a2")
    w.advance(1)
    assert "apply_dropped" in w.kinds()
    assert w.versions()[2] == 1


# A balancer that dies.


@pytest.mark.parametrize(
    ("hindered", "seconds"),
    [
        ({"slow": True}, 0.0),
        ({"slow": True}, 1.0),
        ({"deaf": True}, 1.0),
        ({}, 0.02),
        ({}, 0.04),
        ({}, 0.06),
        ({}, 1.0),
    ],
)
def test_a_restart_in_any_phase_adopts_what_the_ranks_run(hindered: dict[str, bool], seconds: float) -> None:
    w = world()
    w.hold("e2", **hindered)
    w.apply(0, SWAPPED)
    w.advance(seconds)
    w.restart_balancer(state=decode(encode(w.effects.saved[-1])))
    for server_id in ("e1", "a1", "e2", "r1"):
        w.rejoin(server_id)
        w.hold(server_id, slow=False, deaf=False)
        w.migrate()
    w.advance(1)
    assert (w.view.number, w.phase) == (1, Phase.SERVING)
    assert w.agree()
    before = w.versions()[0]
    assert (w.slots(0) == SWAPPED) == (before == 2)
    again = SWAPPED if before == 1 else [0, *SWAPPED[1:8], 4, *SWAPPED[9:]]
    accepted = w.apply(0, again)
    assert accepted[0].version >= 3
    w.advance(1)
    assert w.versions()[0] == accepted[0].version
    assert w.agree()
    plans = {plan.id for plan in w.heard("a1", "plan")}
    assert plans
    assert min(plans) > max(w.effects.saved[0].ledger.plans, default=0)


def test_a_balancer_without_state_learns_of_a_switch_from_the_ranks() -> None:
    w = world()
    w.apply(0, SWAPPED)
    w.advance(0.02)
    w.read()  # the commit
    for server_id in ("a1", "e1", "e2"):
        w.hold(server_id, connected=False)
    w.restart_balancer(state=fresh_state())
    for server_id in ("a1", "e1", "e2"):
        w.rejoin(server_id)
    w.settle()
    assert w.versions()[0] == 1
    w.migrate()
    assert w.servers["a1"].session in w.effects.closed, "it has to come back and bring what it runs"
    for server_id in ("a1", "e1", "e2"):
        w.disconnect(server_id)
        w.rejoin(server_id)
    w.advance(1)
    assert w.versions()[0] == 2
    assert w.agree()


def test_a_plan_that_died_with_its_balancer_is_called_off() -> None:
    """Killed between the sending of a plan and its saving: else the ranks would keep the layer until they forget."""
    w = world()
    saved = w.effects.saved[-1]
    w.hold("e2", slow=True)
    w.apply(0, SWAPPED)
    w.advance(0.1)
    (plan,) = w.heard("a1", "plan")
    w.restart_balancer(state=saved)
    for server_id in ("a1", "e1", "e2"):
        w.rejoin(server_id)
        w.hold(server_id, slow=False)
    for server_id in ("a1", "e1"):  # what a rank could not send while it was alone
        staged = mesh_pb2.MigrationStatus(id=plan.id, phase=mesh_pb2.MIGRATION_PHASE_STAGED)
        w.say(server_id, migration=staged)
    w.advance(0.1)
    assert [w.servers[server_id].staged for server_id in ("a1", "e1")] == [{}, {}]
    assert w.versions()[0] == 1
    w.apply(0, SWAPPED)
    w.advance(1)
    assert w.slots(0) == SWAPPED
    assert w.agree()
