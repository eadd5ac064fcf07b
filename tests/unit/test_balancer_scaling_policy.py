"""The scale policy: bounds and calm of any policy, the wishes of the built-in one, and those of another one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.balancer.scaling_policy import (
    Change,
    Governor,
    RoleSnapshot,
    ScaleSnapshot,
    Wish,
    checked_wishes,
    default_policy,
    load_policy,
)
from expertmesh.mesh.config import parse_config
from expertmesh.mesh.config_scaling import RoleScaling, ScalingConfig
from expertmesh.mesh.errors import UserError

MAX_REQUESTS = 16


def snapshot(attention: int = 2, expert: int = 2, both: int = 0, **fields: Any) -> ScaleSnapshot:
    counts = {"attention": attention, "expert": expert, "both": both}
    roles = {role: RoleSnapshot(target=count, servers=count) for role, count in counts.items()}
    made = ScaleSnapshot(
        roles=roles,
        requests_running=0,
        requests_waiting=0,
        max_requests=MAX_REQUESTS * (attention + both),
        kv_cache_usage=0.0,
        tpot_s=None,
        slots_needed=32,
        slots_there=16 * (expert + both),
        slots_without_one=16 * (expert + both - 1),
    )
    return replace(made, **fields)


def wanted(made: ScaleSnapshot, **settings: Any) -> dict[str, int]:
    return {role: wish.servers for role, wish in default_policy(made, ScalingConfig(**settings)).items()}


class Mesh:
    """A mesh whose servers come and go as a governor has it, each look ``interval_s`` after the one before."""

    def __init__(self, settings: ScalingConfig, **counts: int) -> None:
        self.settings = settings
        self.governor = Governor(settings)
        self.counts = {"attention": 0, "expert": 0, "both": 0, **counts}
        self.now = 0.0
        self.changes: list[tuple[float, Change]] = []

    @property
    def roles(self) -> dict[str, RoleSnapshot]:
        return {role: RoleSnapshot(target=count, servers=count) for role, count in self.counts.items()}

    def look(self, wishes: Mapping[str, Wish]) -> None:
        self.now += self.settings.interval_s
        change = self.governor.decide(wishes, self.roles, self.now)
        if change is not None:
            self.changes.append((self.now, change))
            self.counts[change.role] = change.after


bounds = st.tuples(st.integers(1, 5), st.integers(0, 5)).map(
    lambda b: RoleScaling(min_servers=b[0], max_servers=b[0] + b[1])
)
settings_of_all_kinds = st.builds(
    ScalingConfig,
    attention=bounds,
    expert=bounds,
    hold_s=st.floats(0, 20),
    cooldown_s=st.floats(0, 60),
    max_waiting=st.floats(0.5, 10),
    target_tpot_ms=st.none() | st.floats(1, 100),
    low_share=st.floats(0.05, 0.95),
)


@given(settings_of_all_kinds, st.integers(1, 10), st.lists(st.integers(-50, 50), min_size=5, max_size=80))
def test_no_policy_leaves_its_bounds_or_hurries(settings: ScalingConfig, start: int, wishes: list[int]) -> None:
    """Whatever it answers: a start out of bounds is led back, each change goes one step and waits for its time."""
    mesh = Mesh(settings, attention=start, expert=1)
    low, high = settings.attention.min_servers, settings.attention.max_servers
    for wish in wishes:
        mesh.look({"attention": Wish(servers=wish)})
    for _, change in mesh.changes:
        assert abs(change.after - change.before) == 1
        if low <= change.before <= high:
            assert low <= change.after <= high
        else:
            assert abs(change.after - low) < abs(change.before - low) or abs(change.after - high) < abs(
                change.before - high
            )
    times = [time for time, _ in mesh.changes]
    assert all(later - earlier >= settings.cooldown_s for earlier, later in pairwise(times))
    assert not times or times[0] >= settings.hold_s


@given(settings_of_all_kinds, st.integers(1, 10), st.integers(0, 400), st.floats(0, 0.2), st.integers(1, 96))
def test_a_constant_load_comes_to_rest_without_turning_back(
    settings: ScalingConfig, start: int, requests: int, work_s: float, slots: int
) -> None:
    """So many requests, of which a batch takes what it can; a token takes as long as the expert servers share work."""
    mesh = Mesh(settings, attention=start, expert=start)
    for _ in range(600):
        attention, expert = mesh.counts["attention"], mesh.counts["expert"]
        running = min(requests, MAX_REQUESTS * attention)
        made = snapshot(
            attention,
            expert,
            requests_running=running,
            requests_waiting=requests - running,
            tpot_s=work_s / expert if running else None,
            kv_cache_usage=running / (MAX_REQUESTS * attention),
            slots_needed=slots,
        )
        mesh.look(default_policy(made, settings))
    for role in ("attention", "expert"):
        steps = [change.after - change.before for _, change in mesh.changes if change.role == role]
        assert len(set(steps)) <= 1, steps
    last = max((time for time, _ in mesh.changes), default=0.0)
    assert last < 20 * (settings.hold_s + settings.cooldown_s + 2 * settings.interval_s), "it came to rest"


def test_attention_servers_follow_the_queue() -> None:
    assert wanted(snapshot(requests_running=32, requests_waiting=8))["attention"] == 2
    assert wanted(snapshot(requests_running=32, requests_waiting=9))["attention"] == 3
    assert wanted(snapshot(requests_running=8))["attention"] == 1
    assert wanted(snapshot(requests_running=9))["attention"] == 2, "one alone would be more than half full"
    assert wanted(snapshot(requests_running=8, kv_cache_usage=0.3))["attention"] == 2, "its cache would be, too"
    assert wanted(snapshot(requests_running=2, requests_waiting=1))["attention"] == 2
    assert wanted(snapshot(attention=1))["attention"] == 1


def test_expert_servers_follow_the_time_of_a_token_and_the_room() -> None:
    roomy = {"slots_there": 96, "slots_without_one": 64}
    assert wanted(snapshot(tpot_s=0.05))["expert"] == 2, "no target, no change"
    assert wanted(snapshot(tpot_s=0.05), target_tpot_ms=40)["expert"] == 3
    assert wanted(snapshot(expert=3, tpot_s=0.01, **roomy), target_tpot_ms=40)["expert"] == 2
    assert wanted(snapshot(expert=3, tpot_s=0.015, **roomy), target_tpot_ms=40)["expert"] == 3
    assert wanted(snapshot(expert=2, tpot_s=0.001), target_tpot_ms=40)["expert"] == 2, "one has too little room"
    assert wanted(snapshot(slots_needed=33))["expert"] == 3


def test_colocated_servers_go_only_if_both_halves_can_spare_one() -> None:
    roomy = {"attention": 0, "expert": 0, "both": 3, "slots_there": 96, "slots_without_one": 64}
    assert wanted(snapshot(**roomy), target_tpot_ms=40) == {"both": 2}
    assert wanted(snapshot(requests_running=20, **roomy), target_tpot_ms=40) == {"both": 3}
    assert wanted(snapshot(requests_running=48, requests_waiting=20, **roomy), target_tpot_ms=40) == {"both": 4}


def test_a_wish_has_to_last_and_servers_that_come_or_go_are_waited_for() -> None:
    settings = ScalingConfig(hold_s=10, cooldown_s=0, interval_s=2)
    governor, more = Governor(settings), {"attention": Wish(servers=3)}
    calm = {role: RoleSnapshot(target=2, servers=2) for role in ("attention", "expert", "both")}
    assert governor.decide(more, calm, 0) is None
    assert governor.decide({"attention": Wish(servers=2)}, calm, 8) is None
    assert governor.decide(more, calm, 9) is None, "it began anew"
    assert governor.decide(more, calm, 18) is None
    starting = {**calm, "expert": RoleSnapshot(target=3, servers=2)}
    leaving = {**calm, "expert": RoleSnapshot(target=2, servers=2, leaving=1)}
    for roles in (starting, leaving):
        assert governor.decide(more, roles, 20) is None
    change = governor.decide(more, calm, 22)
    assert change is not None
    assert (change.role, change.before, change.after) == ("attention", 2, 3)


def test_more_comes_before_less() -> None:
    governor = Governor(ScalingConfig(hold_s=0, cooldown_s=0))
    roles = {role: RoleSnapshot(target=3, servers=3) for role in ("attention", "expert", "both")}
    change = governor.decide({"attention": Wish(servers=2), "expert": Wish(servers=4)}, roles, 0)
    assert change is not None
    assert (change.role, change.after) == ("expert", 4)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [(None, "NoneType"), ({"router": 1}, "role 'router'"), ({"expert": 1.5}, "1.5"), ({"expert": True}, "True")],
)
def test_an_answer_that_is_none_is_refused(answer: Any, problem: str) -> None:
    with pytest.raises((TypeError, ValueError), match=problem):
        checked_wishes(answer, snapshot().roles)


def test_a_policy_of_ones_own_is_found_by_its_name_or_refused_by_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("someones_policy")
    module.three = lambda snapshot, settings: {"attention": 3}  # type: ignore[attr-defined]
    module.number = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "someones_policy", module)
    assert load_policy("someones_policy:three") is module.three
    assert load_policy(None) is default_policy
    for hook in ("someones_policy:four", "nobodys_policy:three", "no-such-entry-point", "someones_policy:number"):
        with pytest.raises(UserError, match=r"scaling\.hook"):
            load_policy(hook)


def test_a_mesh_that_is_configured_out_of_bounds_is_refused() -> None:
    keys = {"attention": {"servers": 9}, "scaling": {"policy": "dry-run"}}
    with pytest.raises(UserError, match=r"scaling\.attention allows 1 to 8 servers, and 9 are configured"):
        parse_config(keys)
    assert parse_config({**keys, "scaling": {"policy": False}}).scaling.policy == "off", "as YAML reads a bare off"
