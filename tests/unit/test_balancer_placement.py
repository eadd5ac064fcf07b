from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.balancer.placement_static import CapacityError, place_layer, usable_slots
from expertmesh.balancer.replicas import Table


def held(table_RS: Table, num_experts: int) -> np.ndarray:
    counts_RE = np.zeros((len(table_RS), num_experts), dtype=int)
    for rank, row in enumerate(table_RS):
        for expert in row[row >= 0]:
            counts_RE[rank, expert] += 1
    return counts_RE


def num_loads(old_RS: Table, new_RS: Table, num_experts: int) -> int:
    return int(((held(new_RS, num_experts) > 0) & ~(held(old_RS, num_experts) > 0)).sum())


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    num_experts = draw(st.integers(1, 24))
    capacities = draw(st.lists(st.integers(1, 24), min_size=1, max_size=6))
    if usable_slots(num_experts, capacities) < num_experts:
        capacities.append(num_experts)
    return num_experts, draw(st.integers(num_experts, 3 * num_experts)), capacities


def check(
    table_RS: Table, num_experts: int, num_slots: int, capacities: list[int], *, even_replicas: bool = True
) -> None:
    counts_RE = held(table_RS, num_experts)
    assert counts_RE.max() == 1, "two replicas of an expert on one rank"
    replicas_E = counts_RE.sum(axis=0)
    assert replicas_E.min() >= 1
    assert not even_replicas or replicas_E.max() - replicas_E.min() <= 1
    assert replicas_E.sum() == min(num_slots, usable_slots(num_experts, capacities))
    load_R = counts_RE.sum(axis=1)
    room_R = np.minimum(capacities, num_experts)
    assert (load_R <= room_R).all()
    assert load_R[load_R < room_R].size == 0 or load_R.max() - load_R[load_R < room_R].min() <= 1
    for rank, capacity in enumerate(capacities):
        assert (table_RS[rank, capacity:] == -1).all()
    assert table_RS.shape == (len(capacities), max(capacities))


@given(problems())
def test_a_fresh_placement_is_whole_even_and_deterministic(problem: tuple[int, int, list[int]]) -> None:
    table_RS = place_layer(*problem)
    check(table_RS, *problem)
    assert np.array_equal(table_RS, place_layer(*problem))
    assert np.array_equal(table_RS, place_layer(*problem, table_RS)), "nothing changed, nothing moves"


def changed_servers(
    old_RS: Table, num_experts: int, capacities: list[int], data: st.DataObject
) -> tuple[list[int], Table]:
    """Room of the servers after some left and others came, and what they hold."""
    stays = data.draw(st.lists(st.booleans(), min_size=len(capacities), max_size=len(capacities)))
    kept = [rank for rank, stay in enumerate(stays) if stay]
    joining = [*data.draw(st.lists(st.integers(1, 24), max_size=2)), num_experts]
    new_capacities = [capacities[rank] for rank in kept] + joining
    width = max(new_capacities)
    current_RS = np.full((len(new_capacities), width), -1, dtype=np.int32)
    for row, rank in enumerate(kept):
        current_RS[row, : min(width, old_RS.shape[1])] = old_RS[rank, :width]
    return new_capacities, current_RS


@given(problems(), st.data(), st.booleans())
def test_a_change_of_servers_keeps_the_rules(
    problem: tuple[int, int, list[int]], data: st.DataObject, has_loads: bool
) -> None:
    num_experts, num_slots, capacities = problem
    load_E = np.random.default_rng(num_slots).gamma(0.5, 10, num_experts) if has_loads else None
    new_capacities, current_RS = changed_servers(place_layer(*problem), num_experts, capacities, data)
    new_RS = place_layer(num_experts, num_slots, new_capacities, current_RS, load_E)
    check(new_RS, num_experts, num_slots, new_capacities, even_replicas=not has_loads)
    assert np.array_equal(new_RS, place_layer(num_experts, num_slots, new_capacities, new_RS, load_E))
    stayed = (new_RS == current_RS) & (new_RS >= 0)
    counts = held(np.where(stayed, new_RS, -1), num_experts)
    both = (held(new_RS, num_experts) > 0) & (held(current_RS, num_experts) > 0)
    assert np.array_equal(counts > 0, both), "an expert that stays on a rank stays in its slot"


@given(problems(), st.data())
def test_replicas_by_load_cost_no_more_loads_than_even_ones(
    problem: tuple[int, int, list[int]], data: st.DataObject
) -> None:
    num_experts, num_slots, capacities = problem
    load_E = np.random.default_rng(num_slots).gamma(0.5, 10, num_experts)
    new_capacities, current_RS = changed_servers(place_layer(*problem), num_experts, capacities, data)
    even_RS = place_layer(num_experts, num_slots, new_capacities, current_RS)
    by_load_RS = place_layer(num_experts, num_slots, new_capacities, current_RS, load_E)
    assert num_loads(current_RS, by_load_RS, num_experts) <= num_loads(current_RS, even_RS, num_experts)


def test_the_first_placement_is_linear() -> None:
    assert place_layer(8, 8, [4, 4, 4]).tolist() == [[0, 1, 2, -1], [3, 4, 5, -1], [6, 7, -1, -1]]


def test_a_lost_rank_costs_only_its_own_experts() -> None:
    old_RS = place_layer(32, 32, [16, 16, 16])
    current_RS = old_RS[[0, 2]]
    new_RS = place_layer(32, 32, [16, 16], current_RS)
    assert num_loads(current_RS, new_RS, 32) == 11


def test_a_joining_rank_loads_only_its_own_share() -> None:
    old_RS = place_layer(32, 32, [16, 16, 16])
    current_RS = np.vstack([old_RS, np.full((1, 16), -1, dtype=np.int32)])
    new_RS = place_layer(32, 32, [16] * 4, current_RS)
    assert num_loads(current_RS, new_RS, 32) == 8


def test_replicas_cover_a_lost_rank_without_loading() -> None:
    old_RS = place_layer(8, 16, [8, 8, 8])
    survivors_RS = old_RS[1:]
    assert held(survivors_RS, 8).sum(axis=0).min() >= 1


def test_uneven_servers_fill_to_their_room() -> None:
    table_RS = place_layer(8, 12, [2, 8, 8])
    check(table_RS, 8, 12, [2, 8, 8])
    assert (table_RS >= 0).sum(axis=1).tolist() == [2, 5, 5]


def test_too_little_room_is_refused() -> None:
    with pytest.raises(CapacityError, match="7 usable slots"):
        place_layer(8, 8, [4, 3])
    with pytest.raises(CapacityError):
        place_layer(8, 8, [7, 0])


def test_room_beyond_the_experts_is_of_no_use() -> None:
    assert usable_slots(4, [100, 2]) == 6


def test_a_lost_hot_replica_comes_back_and_hot_ones_stay() -> None:
    load_E = np.array([90.0, 40, 10, 10, 10, 10, 10, 10])
    old_RS = np.array([[0, 1, 2, 3], [0, 4, 5, -1], [0, 1, 6, 7]], np.int32)
    survivors_RS = np.pad(old_RS[:2], ((0, 0), (0, 2)), constant_values=-1)
    by_load_RS = place_layer(8, 10, [6, 6], survivors_RS, load_E)
    assert held(by_load_RS, 8).sum(axis=0).tolist() == [2, 2, 1, 1, 1, 1, 1, 1]
    assert num_loads(survivors_RS, by_load_RS, 8) == 3


def test_a_joining_rank_takes_replicas_of_the_hot_experts() -> None:
    load_E = np.array([10.0, 10, 10, 90, 10, 10, 80, 10])
    current_RS = np.vstack([place_layer(8, 8, [6, 6]), np.full((1, 6), -1, np.int32)])
    by_load_RS = place_layer(8, 11, [6, 6, 6], current_RS, load_E)
    assert held(by_load_RS, 8)[2, [3, 6]].tolist() == [1, 1]
    assert held(by_load_RS, 8).sum(axis=0).max() == 2
    assert num_loads(current_RS, by_load_RS, 8) == 3
