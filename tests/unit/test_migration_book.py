"""The state machine of migrations on one rank, and on several that agree in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from expertmesh.mesh.migration_book import LIFETIME_IN_TIMEOUTS, Migration, MigrationBook, PlanRefusedError
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2
from support.migration import make_plan, make_view

OLD = [0, 1, 2, 3, -1, -1]
NEW = [0, 1, 3, 2, 0, -1]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def book_of(view: ViewInfo, clock: Clock | None = None) -> MigrationBook:
    return MigrationBook(view, num_experts=4, clock=clock or Clock())


@pytest.fixture
def book() -> MigrationBook:
    return book_of(make_view("ae", {0: OLD, 1: OLD}, num_slots=6))


def opened(book: MigrationBook, plan: mesh_pb2.MigrationPlan) -> Migration:
    migration = book.open(plan)
    assert migration is not None
    return migration


def stage(book: MigrationBook, migration: Migration) -> bool:
    return book.staged(migration, mesh_pb2.MigrationStatus(id=migration.id, phase=mesh_pb2.MIGRATION_PHASE_STAGED))


def slots_of(view: ViewInfo, layer: int) -> list[int]:
    return next(list(placement.slots) for placement in view.proto.placement if placement.layer == layer)


def test_the_way_of_a_plan(book: MigrationBook) -> None:
    before = book.view
    migration = opened(book, make_plan(7, book.view, 1, NEW))
    assert list(book.listed()) == []
    assert book.commit(7)
    assert list(book.listed()) == []  # heard before it was staged
    assert stage(book, migration)
    assert list(book.listed()) == [7]
    assert book.switch([7], step=5) == [migration]
    assert list(book.listed()) == []
    assert (slots_of(book.view, 1), book.view.versions) == (NEW, {0: 1, 1: 2})
    assert (slots_of(before, 1), before.versions) == (OLD, {0: 1, 1: 1})  # whoever holds it is not disturbed
    assert migration.outcome == "committed"
    assert book.switch([], step=6) == []


def test_a_newer_plan_takes_the_place_of_one_that_its_balancer_forgot(book: MigrationBook) -> None:
    old, other = opened(book, make_plan(7, book.view, 1, NEW)), opened(book, make_plan(6, book.view, 0, NEW))
    stage(book, old)
    newer = make_plan(8, book.view, 1, NEW)
    assert book.supersede(make_plan(5, book.view, 1, NEW)) == []  # it is the older one
    assert book.supersede(newer) == [old]
    assert (old.outcome, old.called_off.is_set(), other.outcome) == ("superseded", True, "")
    migration = opened(book, newer)
    assert not book.commit(7)
    book.commit(8)
    stage(book, migration)
    assert list(book.listed()) == [8]
    assert book.supersede(make_plan(9, book.view, 1, NEW)) == []  # the step may be under way elsewhere
    assert book.switch([8], step=5) == [migration]


def test_a_listing_binds_for_its_step_only(book: MigrationBook) -> None:
    migration = opened(book, make_plan(7, book.view, 1, NEW))
    stage(book, migration)
    book.commit(7)
    assert list(book.listed()) == [7]
    assert book.drop(7, "aborted") is migration
    assert list(book.listed()) == [7]  # the step may be under way elsewhere
    with pytest.raises(PlanRefusedError, match="layer 1 has migration 7 under way"):
        book.open(make_plan(8, book.view, 1, NEW))
    assert book.switch([], step=5) == []
    assert list(book.listed()) == []
    assert book.open(make_plan(8, book.view, 1, NEW)) is not None


def test_a_switch_that_was_agreed_on_goes_before_an_abort(book: MigrationBook) -> None:
    migration = opened(book, make_plan(7, book.view, 1, NEW))
    stage(book, migration)
    book.commit(7)
    book.listed()
    book.drop(7, "aborted")
    assert book.switch([7], step=5) == [migration]
    assert migration.outcome == "committed"
    assert slots_of(book.view, 1) == NEW
    assert book.drop(7, "aborted") is None


def test_what_comes_again_is_answered_again(book: MigrationBook) -> None:
    plan = make_plan(7, book.view, 1, NEW)
    migration = opened(book, plan)
    assert book.open(plan) is None
    assert book.status(7) is None
    stage(book, migration)
    status = book.status(7)
    assert status is not None
    assert status.phase == mesh_pb2.MIGRATION_PHASE_STAGED
    assert book.commit(7)
    assert book.commit(7)
    book.listed()
    book.switch([7], step=5)
    assert book.open(plan) is None
    assert book.commit(7)
    assert list(book.listed()) == []
    status = book.status(7)
    assert status is not None
    assert (status.phase, status.step) == (mesh_pb2.MIGRATION_PHASE_COMMITTED, 5)


def test_a_commit_without_its_plan(book: MigrationBook) -> None:
    assert not book.commit(7)
    assert book.drop(7, "aborted") is None
    assert list(book.listed()) == []


def test_a_switch_that_was_never_listed_is_our_mistake(book: MigrationBook) -> None:
    with pytest.raises(AssertionError, match="never listed"):
        book.switch([7], step=5)


def test_what_the_balancer_forgot_is_dropped() -> None:
    clock = Clock()
    book = book_of(make_view("ae", {0: OLD}, num_slots=6), clock)
    migration = opened(book, make_plan(7, book.view, 0, NEW, timeout_s=10))
    clock.now += 10 * LIFETIME_IN_TIMEOUTS
    assert book.drop_forgotten() == []
    clock.now += 0.1
    assert book.drop_forgotten() == [migration]
    assert migration.called_off.is_set()
    assert not stage(book, migration)


def wrong_plans(view: ViewInfo) -> dict[str, mesh_pb2.MigrationPlan]:
    plans = {}

    def add(problem: str, slots: Sequence[int] = NEW, layer: int = 1) -> mesh_pb2.MigrationPlan:
        plans[problem] = make_plan(7, view, layer, slots)
        return plans[problem]

    add("it is for view 4, this rank is in view 3").view_number = 4
    add("layer 1 runs version 1, the plan's is 1").placement.version = 1
    add("layer 5 has no experts").placement.layer = 5
    add("it has 5 slots, the view 6", NEW[:5])
    add("it names an expert outside 0..3", [0, 1, 3, 2, 4, -1])
    add(r"experts \[2\] have no slot", [0, 1, 3, 3, -1, -1])
    add("rank 2 has room for 2 experts a layer", [0, 1, 3, 2, 0, 1])
    del add(r"slots \[2, 3, 4\] change, but transfers go to \[2, 3\]").transfers[2]
    add(r"transfers go to \[1, 3, 4\]").transfers[0].slot = 1
    add(r"transfers go to \[2, 3, 3\]").transfers[2].slot = 3
    add("the transfer to slot 2 brings expert 1 instead of 3").transfers[0].expert = 1
    add("slot 0 does not hold expert 3").transfers[0].source_slot = 0
    add("slot 6 does not hold expert 3").transfers[0].source_slot = 6
    return plans


@pytest.mark.parametrize("problem", wrong_plans(make_view("aee", {0: OLD, 1: OLD}, num_slots=3)))
def test_a_plan_that_does_not_fit_changes_nothing(problem: str) -> None:
    view = make_view("aee", {0: OLD, 1: OLD}, num_slots=3)
    view.proto.ranks[2].num_slots = 2  # a smaller server than the others
    book = book_of(view)
    with pytest.raises(PlanRefusedError, match=problem):
        book.open(wrong_plans(view)[problem])
    assert book.view is view
    assert book.open(make_plan(7, view, 1, NEW)) is not None


class SeveralRanks:
    """Ranks hear plans, commits and aborts at different times or never, and agree as the lockstep does."""

    SIZE = 3

    def __init__(self) -> None:
        view = make_view("aee", {0: OLD, 1: OLD}, num_slots=3)
        self.clock = Clock()
        self.books = [book_of(ViewInfo(view.proto, rank), self.clock) for rank in range(self.SIZE)]
        self.working: list[list[Migration]] = [[] for _ in self.books]
        self.plans: list[mesh_pb2.MigrationPlan] = []
        self.listed: list[set[int]] = [set() for _ in self.books]
        self.step = 0
        self.num_switched = 0

    def plan(self, hearing: Sequence[int], layer: int, slots: Sequence[int]) -> None:
        self.plans.append(make_plan(len(self.plans) + 1, self.books[0].view, layer, slots, timeout_s=10))
        self.plan_comes(hearing, 0)

    def plan_comes(self, hearing: Sequence[int], back: int) -> None:
        for rank in hearing if self.plans else ():
            try:
                migration = self.books[rank].open(self.plans[-1 - back % len(self.plans)])
            except PlanRefusedError:
                continue
            if migration is not None:
                self.working[rank].append(migration)

    def is_staged(self, hearing: Sequence[int]) -> None:
        for rank in hearing:
            if self.working[rank]:
                stage(self.books[rank], self.working[rank].pop(0))

    def commit(self, hearing: Sequence[int], back: int) -> None:
        for rank in hearing if self.plans else ():
            self.books[rank].commit(self.plans[-1 - back % len(self.plans)].id)

    def abort(self, hearing: Sequence[int], back: int) -> None:
        for rank in hearing if self.plans else ():
            self.books[rank].drop(self.plans[-1 - back % len(self.plans)].id, "aborted")

    def time_passes(self, hearing: Sequence[int], seconds: float) -> None:
        self.clock.now += seconds
        for rank in hearing:
            self.books[rank].drop_forgotten()

    def list_ready(self) -> None:
        """The first half of a lockstep: other things may happen before the second one."""
        self.listed = [set(book.listed()) for book in self.books]

    def agree_and_step(self) -> None:
        again = [set(book.listed()) for book in self.books]
        assert all(now >= before for now, before in zip(again, self.listed, strict=True)), "a listing was taken back"
        agreed = sorted(set.intersection(*again))
        for book in self.books:
            switched = book.switch(agreed, self.step)
            assert [migration.id for migration in switched] == agreed
            assert all(migration.is_staged for migration in switched)
        first, *others = (list(book.view.proto.placement) for book in self.books)
        assert all(other == first for other in others)
        self.num_switched += len(agreed)
        self.listed = [set() for _ in self.books]
        self.step += 1


EVERYBODY = (0, 1, 2)
HEARING = st.one_of(st.just(EVERYBODY), st.just(EVERYBODY), st.sampled_from([(0, 1), (1, 2), (0, 2), (1,)]))
PLACEMENTS = st.sampled_from([OLD, NEW, [1, 0, 2, 3, -1, -1], [3, 2, 1, 0, 0, 3], [-1, -1, 0, 1, 2, 3]])
BACK = st.sampled_from([0, 0, 0, 1, 2])
ACTIONS = st.one_of(
    st.tuples(st.just("plan"), HEARING, st.integers(0, 1), PLACEMENTS),
    st.tuples(st.just("plan"), HEARING, st.integers(0, 1), PLACEMENTS),
    st.tuples(st.just("plan_comes"), HEARING, BACK),
    st.tuples(st.just("is_staged"), HEARING),
    st.tuples(st.just("is_staged"), HEARING),
    st.tuples(st.just("commit"), HEARING, BACK),
    st.tuples(st.just("commit"), HEARING, BACK),
    st.tuples(st.just("abort"), HEARING, BACK),
    st.tuples(st.just("time_passes"), HEARING, st.sampled_from([1.0, 20.0, 31.0])),
    st.tuples(st.just("list_ready")),
    st.tuples(st.just("agree_and_step")),
    st.tuples(st.just("agree_and_step")),
)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.lists(ACTIONS, min_size=20, max_size=60))
def test_all_ranks_run_the_same_placement_whatever_they_hear(actions: list[tuple[Any, ...]]) -> None:
    ranks = SeveralRanks()
    for name, *arguments in actions:
        getattr(ranks, name)(*arguments)
    ranks.agree_and_step()
    event("switched" if ranks.num_switched else "nothing switched")
