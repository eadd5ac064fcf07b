"""Weights from rank to rank over real links, ranks as threads."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import torch

from expertmesh.mesh import sidegroup
from expertmesh.mesh.pace import Pace
from expertmesh.mesh.side_transfers import Give, Take, checksum
from support.side_plans import WEIGHTS, Groups, blank, patience, run

LARGE = (torch.rand(1 << 20), torch.rand(1 << 19))  # more than the kernel buffers


@pytest.fixture
def pair() -> Iterator[Groups]:
    made = Groups()
    yield made
    made.close()


def test_weights_arrive_whoever_comes_first(pair: Groups) -> None:
    for _ in range(3):
        pair.hand_over()
    first, into = next(pair.ids), blank()
    taking = pair.takes(first, into)
    with pytest.raises(TimeoutError):
        taking.result(0.05)
    pair.gives(first, WEIGHTS).result(20)
    assert taking.result(20) == {}
    second = next(pair.ids)
    giving = pair.gives(second, WEIGHTS)
    with pytest.raises(TimeoutError):
        giving.result(0.05)
    assert pair.takes(second, into).result(20) == {}
    giving.result(20)


def test_all_ranks_give_and_take_at_once() -> None:
    """Far more than the kernel's buffers in every direction."""
    size = 3
    made = Groups(size)
    ways = list(itertools.permutations(range(size), 2))
    sent = [tuple(torch.full_like(part, 1 + number) for part in LARGE) for number in range(len(ways))]
    got = [blank(LARGE) for _ in ways]
    futures = []
    for rank, group in enumerate(made.groups):
        takes = [Take(number, source, got[number]) for number, (source, to) in enumerate(ways) if to == rank]
        gives = [Give(number, to, sent[number]) for number, (source, to) in enumerate(ways) if source == rank]
        futures.append(made.pool.submit(run, group, 1, takes, gives, patience(20)))
    assert [future.result(20) for future in futures] == [{}] * size
    for weights, want in zip(got, sent, strict=True):
        assert all(torch.equal(part, other) for part, other in zip(weights, want, strict=True))
    made.close()


def test_a_source_that_does_not_come_costs_this_transfer_only(pair: Groups) -> None:
    late = next(pair.ids)
    error = pair.takes(late, blank(), patience(0.02)).result(20)[0]
    assert error.cause == "called_off"
    pair.gives(late, WEIGHTS, patience(0.02)).result(20)  # sent into nothing
    pair.hand_over()


def test_a_destination_that_does_not_come_costs_this_transfer_only(pair: Groups) -> None:
    late = next(pair.ids)
    pair.gives(late, WEIGHTS, patience(0.02)).result(20)
    taking = pair.takes(late, blank(), patience(60))
    # At its next plan the source says that this one is over.
    giving = pair.gives(next(pair.ids), WEIGHTS, patience(1.0))
    assert "given the plan up" in str(taking.result(20)[0])
    giving.result(20)
    pair.hand_over()


@pytest.mark.parametrize("end", ["source", "destination"])
def test_calling_off_ends_the_wait_at_once(pair: Groups, end: str) -> None:
    waits, plan = patience(60), next(pair.ids)
    future = pair.gives(plan, WEIGHTS, waits) if end == "source" else pair.takes(plan, blank(), waits)
    with pytest.raises(TimeoutError):
        future.result(0.05)
    waits.called_off.set()
    (pair.source if end == "source" else pair.destination).wake()
    failed = future.result(20)
    assert list(failed) == ([] if end == "source" else [0])
    pair.hand_over()


@pytest.mark.parametrize("first", ["source", "destination"])
def test_calling_off_in_the_middle_of_the_weights(first: str) -> None:
    """At a rate at which they would take a minute; the link is as good as new for the next plan."""
    slow = Groups(bytes_per_s=100_000.0)
    plan, into = next(slow.ids), blank(LARGE)
    ends = {"source": patience(600), "destination": patience(600)}
    futures = {
        "source": slow.gives(plan, LARGE, ends["source"]),
        "destination": slow.takes(plan, into, ends["destination"]),
    }
    deadline_s = time.monotonic() + 30
    while not into[0][0]:
        assert time.monotonic() < deadline_s, "nothing comes"
    for end in sorted(ends, key=lambda end: end != first):
        ends[end].called_off.set()
        (slow.source if end == "source" else slow.destination).wake()
        assert list(futures[end].result(20)) == ([] if end == "source" else [0])
    seen = into[0].clone()
    assert not seen[-1], "it was to be called off in the middle"
    slow.source._pace = Pace(1e9)
    slow.hand_over(LARGE)  # behind the rest of the first plan's weights
    assert torch.equal(into[0], seen), "memory that was let go was written to"
    slow.close()


def test_what_arrives_damaged_is_noticed(pair: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    right = checksum(WEIGHTS)
    monkeypatch.setattr(sidegroup, "checksum", lambda weights: right + (weights[0] is WEIGHTS[0]))
    plan = next(pair.ids)
    giving = pair.gives(plan, WEIGHTS)
    error = pair.takes(plan, blank()).result(20)[0]
    assert error.cause == "checksum"
    assert "has checksum" in str(error)
    giving.result(20)
    monkeypatch.undo()
    pair.hand_over()


def test_weights_of_another_size_are_refused(pair: Groups) -> None:
    plan = next(pair.ids)
    giving = pair.gives(plan, WEIGHTS)
    error = pair.takes(plan, (torch.zeros(3, 4), torch.zeros(5))).result(20)[0]
    assert "34 bytes instead of 68" in str(error)
    giving.result(20)
    pair.hand_over()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_nobody_waits_for_a_peer_that_has_gone(pair: Groups, when: str) -> None:
    """As when it was killed, its links are closed."""
    if when == "before":
        pair.source.close()
    taking = pair.takes(1, blank(), patience(60))
    if when == "meanwhile":
        with pytest.raises(TimeoutError):
            taking.result(0.05)
        pair.source.close()
    error = taking.result(20)[0]
    assert error.cause == "broken"
    assert "the link to expert rank 0 is broken" in str(error)
    giving = pair.pool.submit(run, pair.destination, 2, [], [Give(0, 0, WEIGHTS)], patience(60))
    assert giving.result(20) == {}


def test_the_rate_is_kept_and_a_plan_that_would_be_late_goes_faster() -> None:
    num_bytes = sum(part.nbytes for part in LARGE)
    paced = Groups(bytes_per_s=num_bytes / 0.4)
    started_s = time.monotonic()
    paced.hand_over(LARGE)
    assert time.monotonic() - started_s > 0.3
    paced.close()
    hurried = Groups(bytes_per_s=num_bytes / 1000)
    plan, into = next(hurried.ids), blank(LARGE)
    giving = hurried.gives(plan, LARGE, patience(4.0))
    assert hurried.takes(plan, into, patience(4.0)).result(20) == {}
    giving.result(20)
    hurried.close()
