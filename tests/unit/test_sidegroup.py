"""Weights from rank to rank over a real gloo group, ranks as threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

from expertmesh.mesh import sidegroup
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.sidegroup import Patience, SideGroup, TransferError
from support.groups import side_groups

WEIGHTS = (torch.arange(12, dtype=torch.bfloat16).view(3, 4), torch.ones(5, dtype=torch.bfloat16))


def patience(seconds: float = 5.0) -> Patience:
    return Patience(threading.Event(), time.monotonic() + seconds)


def blank() -> ExpertWeights:
    return tuple(torch.zeros_like(part) for part in WEIGHTS)


class Pair:
    def __init__(self) -> None:
        self.store = HashStore()
        self.groups = side_groups(2, store=self.store)
        self.pool = ThreadPoolExecutor(4)
        list(self.pool.map(lambda group: group.open(patience()), self.groups))

    @property
    def source(self) -> SideGroup:
        return self.groups[0]

    @property
    def destination(self) -> SideGroup:
        return self.groups[1]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.pool.shutdown()
    for group in made.groups:
        group.close()


def hand_over(pair: Pair, name: str) -> bool:
    """Whether a transfer works."""
    into = blank()
    giving = pair.pool.submit(pair.source.give, name, WEIGHTS, 1, patience())
    pair.destination.take(name, into, 0, patience())
    for part, sent in zip(into, WEIGHTS, strict=True):
        torch.testing.assert_close(part, sent, rtol=0, atol=0)
    return giving.result(5)


def test_weights_arrive_whoever_comes_first(pair: Pair) -> None:
    for number in range(3):
        assert hand_over(pair, f"1/{number}")
    into = blank()
    taking = pair.pool.submit(pair.destination.take, "2/0", into, 0, patience())
    while not pair.store.check(["2/0"]):
        assert not taking.done()
    assert pair.source.give("2/0", WEIGHTS, 1, patience())
    taking.result(5)
    assert torch.equal(into[0], WEIGHTS[0])
    assert not pair.store.check(["2/0"])


def test_a_source_that_does_not_come_costs_this_transfer_only(pair: Pair) -> None:
    with pytest.raises(TransferError) as caught:
        pair.destination.take("1/0", blank(), 0, patience(0.02))
    assert caught.value.cause == "called_off"
    assert not pair.source.give("1/0", WEIGHTS, 1, patience())  # too late: it is told so at once
    assert hand_over(pair, "1/1")


def test_a_destination_that_does_not_come_costs_this_transfer_only(pair: Pair) -> None:
    assert not pair.source.give("1/0", WEIGHTS, 1, patience(0.02))
    with pytest.raises(TransferError):
        pair.destination.take("1/0", blank(), 0, patience())
    assert hand_over(pair, "1/1")


@pytest.mark.parametrize("end", ["source", "destination"])
def test_calling_off_ends_the_wait_at_once(pair: Pair, end: str) -> None:
    waits = patience(60)
    if end == "source":
        future = pair.pool.submit(pair.source.give, "1/0", WEIGHTS, 1, waits)
    else:
        future = pair.pool.submit(pair.destination.take, "1/0", blank(), 0, waits)  # type: ignore[arg-type]  # None
    waits.called_off.set()
    if end == "source":
        assert future.result(1) is False
    else:
        assert isinstance(future.exception(1), TransferError)
    assert hand_over(pair, "1/1")


def test_what_arrives_damaged_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sidegroup.checksum(WEIGHTS)
    monkeypatch.setattr(sidegroup, "checksum", lambda weights: right + (weights is WEIGHTS))
    giving = pair.pool.submit(pair.source.give, "1/0", WEIGHTS, 1, patience())
    with pytest.raises(TransferError, match="has checksum") as caught:
        pair.destination.take("1/0", blank(), 0, patience())
    assert caught.value.cause == "checksum"
    assert giving.result(5)
    monkeypatch.undo()
    assert hand_over(pair, "1/1")


def test_a_peer_that_dies_breaks_the_group_and_no_wait_is_long(pair: Pair) -> None:
    """The source says go and is gone: as a process that was killed, its links are closed."""
    into = blank()
    taking = pair.pool.submit(pair.destination.take, "1/0", into, 0, patience())
    while not pair.store.check(["1/0"]):
        assert not taking.done()
    description = sidegroup._description(WEIGHTS)
    pair.store.compare_set("1/0", "want", f"go {sidegroup.checksum(WEIGHTS)} {description}")
    started_s = time.monotonic()
    pair.source.close()
    error = taking.exception(5)
    assert time.monotonic() - started_s < 2
    assert isinstance(error, TransferError)
    assert error.cause == "broken"
    assert "failed" in pair.destination.broken
    # From now on nobody waits for it.
    with pytest.raises(TransferError, match="broken"):
        pair.destination.take("1/1", into, 0, patience(60))
    assert not pair.destination.give("1/2", WEIGHTS, 0, patience(60))


def test_the_other_end_of_a_broken_group_does_not_wait_either(pair: Pair) -> None:
    pair.source.broken = "for the test"
    taking = pair.pool.submit(pair.destination.take, "1/0", blank(), 0, patience(60))
    assert not pair.source.give("1/0", WEIGHTS, 1, patience(60))
    assert isinstance(taking.exception(5), TransferError)
    assert not pair.destination.broken


def test_weights_of_another_shape_are_refused(pair: Pair) -> None:
    giving = pair.pool.submit(pair.source.give, "1/0", WEIGHTS, 1, patience())
    with pytest.raises(TransferError, match=r"sends torch.bfloat16\[3,4\]"):
        pair.destination.take("1/0", (torch.zeros(3, 4), torch.zeros(5)), 0, patience())
    pair.destination.close()
    assert not giving.result(8)


def test_a_rank_that_never_comes_to_the_group() -> None:
    (group, _) = side_groups(2)
    group.open(patience(0.02))
    assert "not all expert ranks came" in group.broken
    assert not group.give("1/0", WEIGHTS, 1, patience(0.02))
    with pytest.raises(TransferError, match="not all expert ranks came"):
        group.take("1/0", blank(), 1, patience(0.02))
