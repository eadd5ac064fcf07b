"""Side groups whose ranks are threads of the test process, and plans that they go through."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.side_transfers import Give, Patience, Take, TransferError
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.weight_reads import WeightReads
from support.groups import side_links

WEIGHTS = (torch.arange(12, dtype=torch.bfloat16).view(3, 4), torch.ones(5, dtype=torch.bfloat16))

ENDS_S = 20.0

Failed = dict[int, TransferError]


def patience(seconds: float = 20.0) -> Patience:
    return Patience(threading.Event(), time.monotonic() + seconds)


def blank(like: ExpertWeights = WEIGHTS) -> ExpertWeights:
    return tuple(torch.zeros_like(part) for part in like)


class Groups:
    """``groups[0]`` is the source of most transfers, ``groups[1]`` the destination. A plan is a future on each."""

    def __init__(
        self, size: int = 2, bytes_per_s: float = 1e9, reads: Sequence[WeightReads | None] = (None, None, None)
    ) -> None:
        pairs = zip(side_links(size), reads, strict=False)
        self.groups = [SideGroup(links, bytes_per_s=bytes_per_s, reads=own) for links, own in pairs]
        self.pool = ThreadPoolExecutor(2 * size)
        self.ids = itertools.count(1)

    @property
    def source(self) -> SideGroup:
        return self.groups[0]

    @property
    def destination(self) -> SideGroup:
        return self.groups[1]

    def takes(self, plan: int, into: ExpertWeights, waits: Patience | None = None) -> Future[Failed]:
        return self.pool.submit(run, self.destination, plan, [Take(0, 0, into)], [], waits or patience())

    def gives(self, plan: int, weights: ExpertWeights, waits: Patience | None = None) -> Future[Failed]:
        return self.pool.submit(run, self.source, plan, [], [Give(0, 1, weights)], waits or patience())

    def hand_over(self, weights: ExpertWeights = WEIGHTS) -> None:
        """A transfer works."""
        plan, into = next(self.ids), blank(weights)
        giving, taking = self.gives(plan, weights), self.takes(plan, into)
        assert taking.result(10) == {}
        giving.result(10)
        assert all(torch.equal(part, sent) for part, sent in zip(into, weights, strict=True))

    def close(self) -> None:
        self.pool.shutdown()
        for group in self.groups:
            group.close()


def run(group: SideGroup, plan: int, takes: list[Take], gives: list[Give], waits: Patience) -> Failed:
    """One plan as a rank goes through it."""
    group.begin(plan, takes, gives, waits)
    try:
        failed = group.take(waits)
        not_given = group.give(waits)
    finally:
        group.end()
    assert not_given in ([], [give.number for give in gives])
    return failed


def until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + ENDS_S
    while not holds():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.002)
