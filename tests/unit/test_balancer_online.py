"""Mode online against traffic that is steady, skewed, scarce; a solver that fails or hangs; administrators."""

from __future__ import annotations

import itertools
from typing import Any

import grpc
import pytest

from expertmesh.balancer.evaluation import EVALUATION_TIMEOUT_S
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.state import decode, encode
from support.balancer_parts import config, registration
from support.balancer_world import World
from support.online_world import EVEN, HALF_LIFE, SKEWED, VERY_SKEWED, loads, traffic, world


def test_steady_balanced_traffic_moves_nothing() -> None:
    w = world()
    traffic(w, EVEN, windows=10)
    assert len(w.policy.asked) == 20, "both layers were looked at in every window"
    assert (loads(w), w.versions()) == (0, {0: 1, 2: 1})


def test_skewed_traffic_moves_experts_within_the_budget_then_all_is_quiet() -> None:
    w = world(max_slots_per_update=2)
    traffic(w, SKEWED, windows=3)
    assert w.versions() == {0: 2, 2: 2}
    assert w.agree()
    assert all(len(plan.transfers) <= 2 for plan in w.heard("a1", "plan"))
    servers = {w.slots(0).index(expert) // w.view.slots_per_rank for expert in (0, 1)}
    assert servers == {0, 1}, "the two popular experts are apart"
    moved = loads(w)
    traffic(w, SKEWED, windows=10)
    assert loads(w) == moved
    assert "balancedness 0.700 → 1.000" in w.messages("migration_planned")[0]


def test_few_tokens_prove_nothing() -> None:
    w = world()
    traffic(w, [1.1, 1.1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], tokens=400)
    assert (len(w.policy.asked), loads(w)) == (2, 0)
    w = world()
    traffic(w, VERY_SKEWED, tokens=200)
    assert w.policy.asked == [], "less than a quarter of the half-life"


def test_a_layer_is_not_judged_again_before_fresh_tokens() -> None:
    w = world(max_slots_per_update=2)
    heavy = [16.0, 8.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    traffic(w, heavy, layers=(0,))
    assert w.versions()[0] == 2
    w.advance(60, step_s=0.25)
    assert len(w.policy.asked) == 1
    w.statistics.count(0, heavy, 99)
    w.advance(1)
    assert len(w.policy.asked) == 1
    w.statistics.count(0, heavy, 1000)
    w.advance(1)
    assert len(w.policy.asked) == 2


def test_the_best_layer_goes_first_and_the_others_follow() -> None:
    w = world(layer_updates_per_iter=1)
    w.hold("e2", slow=True)
    w.statistics.count(0, SKEWED, 2000)
    w.statistics.count(2, VERY_SKEWED, 2000)
    w.advance(1)
    assert [migration.layer for migration in w.control.migrations] == [2]
    w.hold("e2", slow=False)
    w.advance(1)
    assert [plan.placement.layer for plan in w.heard("a1", "plan")] == [2, 0]
    assert w.versions() == {0: 2, 2: 2}


def test_several_layers_migrate_at_a_time_when_told_so() -> None:
    w = world(layer_updates_per_iter=2)
    w.hold("e2", slow=True)
    traffic(w, SKEWED)
    assert sorted(migration.layer for migration in w.control.migrations) == [0, 2]


def test_nothing_is_evaluated_while_something_migrates() -> None:
    w = world()
    w.hold("e2", slow=True)
    traffic(w, SKEWED)
    asked = len(w.policy.asked)
    traffic(w, VERY_SKEWED)
    assert len(w.policy.asked) == asked


def test_what_comes_next_is_known_before_a_migration_ends() -> None:
    w = world(layer_updates_per_iter=1)
    w.statistics.count(0, SKEWED, 2000)
    w.hold("e2", slow=True)
    w.advance(1)
    asked = len(w.policy.asked)
    w.statistics.count(2, VERY_SKEWED, 2000)
    w.advance(1)
    assert [migration.layer for migration in w.control.migrations] == [0]
    w.statistics.count(2, VERY_SKEWED, 300)
    w.advance(1)
    w.hold("e2", slow=False)
    w.advance(1)
    assert w.versions() == {0: 2, 2: 2}
    assert len(w.policy.asked) == asked + 1, "the traffic was the same since"


def test_a_layer_that_waits_for_its_turn_is_searched_again_then_and_not_before() -> None:
    w = world(layer_updates_per_iter=1)
    w.statistics.count(0, SKEWED, 2000)
    w.statistics.count(2, VERY_SKEWED, 2000)
    w.hold("e2", slow=True)
    w.advance(1)
    assert [migration.layer for migration in w.control.migrations] == [2]
    w.statistics.count(0, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.0, 4.0], 2000)  # the best of those that wait: asked again
    w.advance(1)
    assert len(w.policy.asked) == 3
    w.advance(1)
    assert len(w.policy.asked) == 3
    w.hold("e2", slow=False)
    w.advance(1)
    hosts = [{slot // w.view.slots_per_rank for slot, held in enumerate(w.slots(0)) if held == e} for e in (6, 7)]
    assert hosts[0] != hosts[1], "by the traffic as it is now"


def test_steady_traffic_is_looked_at_and_not_searched_for() -> None:
    w = world()
    traffic(w, EVEN)
    assert len(w.policy.asked) == 2
    traffic(w, EVEN, windows=9, tokens=HALF_LIFE / 10)
    assert len(w.policy.asked) == 2
    traffic(w, EVEN, windows=2, tokens=HALF_LIFE / 10)
    assert len(w.policy.asked) == 4, "after a half-life in any case"


def test_a_layer_that_was_settled_follows_another_traffic() -> None:
    w = world()
    traffic(w, EVEN)
    traffic(w, VERY_SKEWED, windows=3, tokens=HALF_LIFE / 10)
    assert w.versions() == {0: 1, 2: 1}
    traffic(w, VERY_SKEWED, windows=3, tokens=HALF_LIFE / 10)
    assert w.versions() == {0: 2, 2: 2}, "twice a quarter of the half-life, after one search that found nothing"


def test_a_layer_whose_migration_fails_waits_longer_each_time() -> None:
    w = world()
    w.hold("e1", broken=True)
    starts = []
    for _ in range(400):
        before = len(w.heard("a1", "plan"))
        w.statistics.count(0, SKEWED, 200)
        w.advance(0.25, step_s=0.25)
        starts += [w.now] * (len(w.heard("a1", "plan")) - before)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps[:3] == pytest.approx([10, 20, 40], abs=0.8)
    assert w.versions()[0] == 1
    assert len(w.messages("migration_aborted")) == len(starts)
    w.hold("e1", broken=False)
    w.advance(81, step_s=0.25)
    traffic(w, SKEWED, layers=(0,))
    assert w.versions()[0] > 1
    assert w.agree()


@pytest.mark.parametrize("settings", [{"mode": "static"}, {"layer_updates_per_iter": 0}])
def test_static_means_static(settings: dict[str, Any]) -> None:
    w = world(**settings)
    traffic(w, VERY_SKEWED, windows=3)
    assert w.policy.asked == []
    assert w.versions() == {0: 1, 2: 1}


def test_the_mode_is_switched_at_run_time() -> None:
    w = world(mode="static")
    traffic(w, SKEWED)
    assert w.control.online.set_mode("online", 1) == "static"
    w.advance(1)
    assert w.versions() == {0: 2, 2: 2}
    assert w.control.online.set_mode("static", None) == "online"
    traffic(w, [1.0, 1.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0], windows=3)
    assert w.versions() == {0: 2, 2: 2}
    assert "online → static, 1 layers at a time" in w.messages("mode_changed")[-1]


def test_a_switched_mode_outlives_the_balancer() -> None:
    w = world(mode="static")
    w.control.online.set_mode("online", 3)
    w.restart_balancer()
    assert (w.control.online.mode, w.control.online.layer_updates_per_iter) == ("online", 3)
    w.restart_balancer(state=decode(encode(w.actual.durable())))  # and the one after it
    assert (w.control.online.mode, w.control.applying.layers_at_a_time) == ("online", 3)
    w.control.online.set_mode("static", None)
    w.restart_balancer()
    assert (w.control.online.mode, w.control.online.layer_updates_per_iter) == ("static", 3)


def test_a_configuration_that_was_changed_beats_an_older_switch() -> None:
    w = world(mode="static")
    w.control.online.set_mode("online", 3)
    settings = w.config.balancer.model_copy(update={"mode": "offline"})
    w.config = w.config.model_copy(update={"balancer": settings})
    w.restart_balancer()
    assert (w.control.online.mode, w.control.online.layer_updates_per_iter) == (
        "offline",
        settings.layer_updates_per_iter,
    )
    assert w.actual.durable().mode_switch is None


@pytest.mark.parametrize(("mode", "layers"), [("offline", None), ("quick", None), ("online", 0)])
def test_a_mode_that_is_none_is_refused(mode: str, layers: int | None) -> None:
    w = world(mode="static")
    with pytest.raises(RefusedError) as refused:
        w.control.online.set_mode(mode, layers)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert w.control.online.mode == "static"


def test_a_solver_that_fails_is_an_event_and_is_asked_again_later() -> None:
    w = world()
    w.policy.broken = True
    traffic(w, SKEWED, windows=3)
    assert w.messages("solver_failed") == ["broken by the test"] * 2
    w.policy.broken = False
    w.advance(10)
    assert w.versions() == {0: 2, 2: 2}


def test_a_solver_that_hangs_is_an_event_and_its_answer_is_ignored() -> None:
    w = world()
    w.solver_hangs = True
    traffic(w, SKEWED)
    w.advance(EVALUATION_TIMEOUT_S + 10, step_s=1.0)
    assert len(w.messages("solver_late")) == 1
    assert len(w.effects.jobs) == 1, "no second job behind one that hangs"
    w.solver_hangs = False
    w.solve()
    w.advance(1)
    assert loads(w) == 0, "it was made for traffic of long ago"
    traffic(w, SKEWED)
    assert w.versions() == {0: 2, 2: 2}


def test_a_proposal_for_another_view_is_not_carried_out() -> None:
    w = world()
    w.solver_hangs = True
    traffic(w, SKEWED)
    w.join("a2")
    w.advance(1)
    w.solver_hangs = False
    w.solve()
    w.advance(1)
    assert w.view.number == 2
    assert loads(w) == 0
    traffic(w, SKEWED)
    assert w.versions() == {0: 2, 2: 2}


def test_few_layers_are_evaluated_at_a_time() -> None:
    settings = config(mode="online", stats_half_life_tokens=HALF_LIFE)
    w = World(settings)
    layers = list(range(10))
    for server_id in ("a1", "e1", "e2"):
        made = registration(server_id)
        made.model.moe_layers[:] = layers
        w.connect(made)
    w.advance(1)
    for layer in layers:
        w.statistics.count(layer, EVEN, 2000)
    w.advance(1)
    assert w.effects.job_sizes == [4, 4, 2]


def test_an_apply_comes_before_the_loops_own_ideas() -> None:
    w = world(layer_updates_per_iter=1)
    w.solver_hangs = True
    traffic(w, SKEWED)
    wanted = [7, 1, 2, 3, -1, -1, -1, -1, 4, 5, 6, 0, -1, -1, -1, -1]
    w.apply(0, wanted)
    w.solver_hangs = False
    w.solve()
    w.advance(1)
    first = w.heard("a1", "plan")[0]
    assert (first.placement.layer, list(first.placement.slots)) == (0, wanted)
    assert w.agree()


def test_traffic_that_changes_is_followed() -> None:
    w = world()
    traffic(w, SKEWED, windows=2)
    before = w.slots(0)
    traffic(w, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], windows=4)
    assert w.slots(0) == before, "balanced traffic is balanced anywhere"
    hot = [expert for expert in before[:8] if expert >= 0][:2]
    traffic(w, [9.0 if expert in hot else 1.0 for expert in range(8)], windows=4)
    assert w.slots(0) != before
    assert w.agree()
