"""Expert weights by NIXL over UCX's TCP: what comes, what else is left alone, lies, and peers that hang or die."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.mesh import nixl_setup, sidegroup
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.pace import Pace
from expertmesh.mesh.side_transfers import Give, Patience, Take, checksum_in_place
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.weight_reads import SlotMemory, WeightReads, WeightTransport
from support.nixl import needs_nixl
from support.side_plans import ENDS_S, Groups, patience, run, until

pytestmark = [needs_nixl, pytest.mark.slow]

ROWS = 6
SHAPES = {(8, 16): torch.float8_e4m3fn, (16, 4): torch.float8_e4m3fn, (2, 3, 5): torch.float32, (7,): torch.bfloat16}
"""Weights with scales, and a bias that is no multiple of eight bytes."""


class Arena:
    """Random experts, each a row of every part."""

    def __init__(self, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.parts = [torch.randn(ROWS, *shape, generator=drawn).to(dtype) for shape, dtype in SHAPES.items()]
        self.reads = WeightReads(SlotMemory(self.parts), "127.0.0.1")

    def row(self, row: int) -> ExpertWeights:
        return tuple(part[row] for part in self.parts)

    def copy(self) -> list[torch.Tensor]:
        return [part.view(torch.uint8).clone() for part in self.parts]

    def changed(self, before: list[torch.Tensor]) -> set[int]:
        """The rows that are not what they were."""
        pairs = [(part.view(torch.uint8), copy) for part, copy in zip(self.parts, before, strict=True)]
        return {row for row in range(ROWS) if not all(torch.equal(now[row], then[row]) for now, then in pairs)}


class Pair(Groups):
    """The source is the first."""

    def __init__(self, size: int = 2, bytes_per_s: float = 1e9) -> None:
        self.arenas = [Arena(seed) for seed in range(size)]
        super().__init__(size, bytes_per_s, [arena.reads for arena in self.arenas])

    def move(self, from_row: int, to_row: int) -> str:
        """An expert from the source to the destination; returns how it came, or why it did not."""
        plan, into = next(self.ids), self.arenas[1].row(to_row)
        giving = self.gives(plan, self.arenas[0].row(from_row))
        failed = self.takes(plan, into).result(ENDS_S)
        giving.result(ENDS_S)
        return str(failed[0]) if failed else self.destination.came[0].transport

    def close(self) -> None:
        super().close()
        for arena in self.arenas:
            arena.reads.close()


def equal(one: ExpertWeights, other: ExpertWeights) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one, other, strict=True))


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_all_parts_of_a_row_come_and_no_other_row_changes(pair: Pair) -> None:
    before = [arena.copy() for arena in pair.arenas]
    assert pair.move(4, 2) == "nixl"
    assert equal(pair.arenas[1].row(2), pair.arenas[0].row(4))
    assert [arena.changed(copy) for arena, copy in zip(pair.arenas, before, strict=True)] == [set(), {2}]


def test_all_ranks_give_and_take_several_at_once() -> None:
    made = Pair(3)
    ways = list(itertools.permutations(range(3), 2)) * 2
    taken = [0, 0, 0]
    takes: list[list[Take]] = [[], [], []]
    gives: list[list[Give]] = [[], [], []]
    for number, (source, to) in enumerate(ways):
        taken[to] += 1
        takes[to].append(Take(number, source, made.arenas[to].row(1 + taken[to])))
        gives[source].append(Give(number, to, made.arenas[source].row(number % 2)))
    plans = [made.pool.submit(run, made.groups[i], 1, takes[i], gives[i], patience()) for i in range(3)]
    assert [plan.result(ENDS_S) for plan in plans] == [{}] * 3
    for source, own in enumerate(gives):
        for give in own:
            take = next(take for take in takes[give.to] if take.number == give.number)
            assert take.source == source
            assert equal(take.into, give.weights)
    assert {came.transport for group in made.groups for came in group.came.values()} == {"nixl"}
    made.close()


@pytest.mark.parametrize("lacking", [0, 1])
def test_tcp_where_one_of_both_has_no_nixl(pair: Pair, lacking: int) -> None:
    for group in pair.groups:
        group.close()
    reads = [None if index == lacking else arena.reads for index, arena in enumerate(pair.arenas)]
    without = Groups(2, reads=reads)
    pair.groups = without.groups
    assert pair.move(3, 0) == "tcp"
    assert equal(pair.arenas[1].row(0), pair.arenas[0].row(3))
    without.pool.shutdown()


def patched(ticket: bytes, at: int, layout: str, value: int) -> bytes:
    return ticket[:at] + struct.pack(layout, value) + ticket[at + struct.calcsize(layout) :]


LIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "size": (lambda ticket: patched(ticket, 0, "<Q", 1 << 40), "1099511627776 bytes instead of"),
    "address": (lambda ticket: patched(ticket, 13, "<Q", 1 << 20), "tcp"),
    "last address": (lambda ticket: patched(ticket, 37, "<Q", (1 << 64) - 8), "addresses that do not exist"),
    "device": (lambda ticket: patched(ticket, 12, "<B", 0), "tcp"),
    "metadata": (lambda ticket: ticket[:-40] + bytes(40), "tcp"),
    "no metadata": (lambda ticket: ticket[:45], "a ticket of 45 bytes"),
    "much": (lambda ticket: ticket + bytes(1 << 20), "bytes instead of 1048576"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_ticket_that_lies(pair: Pair, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    make, outcome = LIES[lie]
    ticket = pair.arenas[0].reads.ticket
    monkeypatch.setattr(pair.arenas[0].reads, "ticket", lambda weights: make(ticket(weights)))
    before = pair.arenas[1].copy()
    assert outcome in pair.move(4, 2)
    assert pair.arenas[1].changed(before) == ({2} if outcome == "tcp" else set())
    assert equal(pair.arenas[1].row(2), pair.arenas[0].row(4)) == (outcome == "tcp")


def test_weights_that_change_while_they_are_read_are_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def then_change(weights: ExpertWeights) -> int:
        found = checksum_in_place(weights)
        if weights[0].data_ptr() == pair.arenas[0].row(4)[0].data_ptr():
            weights[1].view(torch.uint8)[3, 1] += 1
        return found

    monkeypatch.setattr(sidegroup, "checksum_in_place", then_change)
    assert "has checksum" in pair.move(4, 2)
    monkeypatch.undo()
    assert pair.move(4, 2) == "nixl"


CHANGES: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda flat: flat[0].add_(1),
    lambda flat: flat.copy_(flat.roll(1)),
    lambda flat: flat.copy_(flat.flip(0)),
]


@pytest.mark.parametrize("part", range(len(SHAPES)))
def test_the_checksum_tells_bytes_and_their_places(part: int) -> None:
    drawn = torch.Generator().manual_seed(3)
    expert = tuple(torch.randn(shape, generator=drawn).to(dtype) for shape, dtype in SHAPES.items())
    right = checksum_in_place(expert)
    assert right == checksum_in_place(tuple(part.clone() for part in expert))
    flat = expert[part].view(torch.uint8).flatten()
    kept = flat.clone()
    for change in CHANGES:
        change(flat)
        assert checksum_in_place(expert) != right
        flat.copy_(kept)
    assert checksum_in_place(expert) == right


class Ending(Patience):
    """Its time is over when the test says so."""

    def __init__(self, like: Patience) -> None:
        super().__init__(like.called_off, like.deadline_s)
        object.__setattr__(self, "is_over", threading.Event())

    is_over: threading.Event

    @property
    def left_s(self) -> float:
        return 0.0 if self.is_over.is_set() else super().left_s

    def anew(self, seconds: float) -> Patience:
        return Patience(self.called_off, time.monotonic() + seconds)


class Mute:
    """Over UCX's TCP a source that does not lend never answers: a read of it is under way until it does."""

    def __init__(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        self._agent = pair.arenas[0].reads._agent
        monkeypatch.setattr(pair.arenas[0].reads, "lend", lambda *_: None)

    def answers(self) -> contextlib.AbstractContextManager[None]:
        return self._agent.lending()


def has_begun(reads: WeightReads) -> bool:
    return any(read.handle is not None for read in list(reads._agent._worker.reads))


@pytest.mark.parametrize("how", ["called off", "too late"])
def test_memory_is_not_let_go_while_a_read_may_write_to_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    mute = Mute(pair, monkeypatch)
    monkeypatch.setattr(sidegroup, "_LAST_READS_S", 0.01)
    plan, into = next(pair.ids), pair.arenas[1].row(2)
    both = [Ending(patience()), Ending(patience())]
    giving = pair.gives(plan, pair.arenas[0].row(4), both[0])
    taking = pair.takes(plan, into, both[1])
    until(lambda: has_begun(pair.arenas[1].reads), "no read begins")
    for waits, group in zip(both, pair.groups, strict=True):
        (waits.called_off if how == "called off" else waits.is_over).set()
        group.wake()
    assert taking.result(ENDS_S)[0].cause == "called_off"
    (read,) = pair.destination.leaving.values()
    assert read.take.into is into
    over = read.reading.over
    assert not over.done()
    giving.result(ENDS_S)
    assert pair.move(3, 1) == "tcp"  # who owes a read is not asked for another one
    with mute.answers():
        over.result(ENDS_S)
    assert equal(into, pair.arenas[0].row(4))  # late, but this is where it went


def test_a_read_that_ends_soon_after_it_was_given_up_costs_nothing_else(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = Mute(pair, monkeypatch)
    monkeypatch.setattr(sidegroup, "_LAST_READS_S", ENDS_S)
    plan, waits = next(pair.ids), Ending(patience())
    giving = pair.gives(plan, pair.arenas[0].row(4), waits)
    taking = pair.takes(plan, pair.arenas[1].row(2), waits)
    until(lambda: has_begun(pair.arenas[1].reads), "no read begins")
    waits.is_over.set()
    for group in pair.groups:
        group.wake()
    until(lambda: len(pair.destination.leaving) > 0, "the read was not given up")
    with mute.answers():
        assert taking.result(ENDS_S)[0].cause == "called_off"
    assert pair.destination.leaving == {}
    giving.result(ENDS_S)
    monkeypatch.undo()
    assert pair.move(3, 1) == "nixl"


def test_lending_ends_by_itself(pair: Pair) -> None:
    """Of a destination that says nothing any more; who is done before has it end at once."""
    agent = pair.arenas[0].reads._agent
    began_s = time.monotonic()
    pair.arenas[0].reads.lend("late", began_s + 0.05)
    pair.arenas[0].reads.lend("done", began_s + 600.0)
    until(lambda: "done" in agent._worker.lent, "nothing is lent")
    pair.arenas[0].reads.take_back("done")
    until(lambda: not agent._worker.lent, "it lends for ever")
    assert time.monotonic() >= began_s + 0.05


def test_an_agent_that_ends_in_the_middle_of_a_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a rank is stopped: the memory is written to no more, and whoever waits is told."""
    Mute(pair, monkeypatch)
    plan = next(pair.ids)
    giving, taking = pair.gives(plan, pair.arenas[0].row(4)), pair.takes(plan, pair.arenas[1].row(2))
    reads = pair.arenas[1].reads
    until(lambda: has_begun(reads), "no read begins")
    reading = next(iter(reads._agent._worker.reads))
    reads.close()
    assert not reads._agent._thread.is_alive()
    assert reading.over.done()
    assert taking.result(ENDS_S) == {}  # over the link instead
    giving.result(ENDS_S)
    assert pair.destination.came[0].transport == "tcp"
    assert equal(pair.arenas[1].row(2), pair.arenas[0].row(4))


def test_reads_keep_to_the_rate_of_their_source() -> None:
    made = Pair(bytes_per_s=1e9)
    num_bytes = sum(part[0].nbytes for part in made.arenas[0].parts)
    for rate, limit in ((num_bytes / 0.2, 0.5), (num_bytes / 1000, 0.0)):
        made.source._pace = Pace(rate)
        plan, seconds = next(made.ids), 20.0 if limit else 6.0
        takes = [Take(number, 0, made.arenas[1].row(number)) for number in range(4)]
        gives = [Give(number, 1, made.arenas[0].row(number)) for number in range(4)]
        began_s = time.monotonic()
        giving = made.pool.submit(run, made.source, plan, [], gives, patience(seconds))
        assert made.pool.submit(run, made.destination, plan, takes, [], patience(seconds)).result(ENDS_S) == {}
        assert time.monotonic() - began_s > limit
        giving.result(ENDS_S)
        assert {came.transport for came in made.destination.came.values()} == {"nixl"}
    made.close()


_SOURCE = """
import socket, sys, torch
from expertmesh.mesh.sidegroup import SideGroup
from expertmesh.mesh.pace import Pace
from expertmesh.mesh.side_transfers import Give
from expertmesh.mesh.weight_reads import SlotMemory, WeightReads
from support.side_plans import patience, run

arena = torch.ones(4, 8, 16)
reads = WeightReads(SlotMemory([arena]), "127.0.0.1")
reads.lend = lambda *_: None
group = SideGroup({1: socket.socket(fileno=int(sys.argv[1]))}, bytes_per_s=1e9, reads=reads)
run(group, 1, [], [Give(0, 1, (arena[2],))], patience(600))
"""


def test_a_source_that_is_killed_in_the_middle_of_a_read() -> None:
    arena = torch.zeros(2, 8, 16)
    near, far = socket.socketpair()
    command = [sys.executable, "-c", _SOURCE, str(far.fileno())]
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # `support` is in the first
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    source = subprocess.Popen(command, pass_fds=[far.fileno()], env=environment)
    far.close()
    with contextlib.closing(WeightReads(SlotMemory([arena]), "127.0.0.1")) as reads:
        group = SideGroup({0: near}, bytes_per_s=1e9, reads=reads)
        pool = ThreadPoolExecutor(1)
        taking = pool.submit(run, group, 1, [Take(0, 0, (arena[1],))], [], patience(120))
        try:
            until(lambda: has_begun(reads), "no read begins")
            reading = next(iter(reads._agent._worker.reads))
            assert not reading.over.done()
        finally:
            source.kill()
            source.wait(ENDS_S)
        assert taking.result(ENDS_S)[0].cause == "broken"
        reading.over.result(ENDS_S)
        assert not arena.any()
        pool.shutdown()
        group.close()


class Half:
    """As much of an expert half as is asked."""

    def memory(self) -> list[torch.Tensor]:
        return [torch.zeros(2, 4)]


def transport_of(kind: str, *, device: str = "cpu", encrypts: bool = False, tls: str = "auto") -> WeightTransport:
    config = MeshConfig.model_validate({"balancer": {"migration_transport": kind}, "dataplane": {"tls": tls}})
    half: Any = Half()
    return WeightTransport(config, half, torch.device(device), encrypts=encrypts)


def test_what_is_asked_for_is_what_there_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for kind in ("auto", "tcp"):
        assert transport_of(kind).reads() is None
    with contextlib.closing(transport_of("nixl", encrypts=True)) as transport:
        reads = transport.reads()
        assert reads is not None
        assert transport.reads() is reads
    assert "expert weights come from other ranks by nixl" in caplog.text
    assert "are not encrypted" in caplog.text
    with pytest.raises(UserError, match=r"(?s)dataplane\.tls.*migration_transport: tcp"):
        transport_of("nixl", encrypts=True, tls="on")
    assert transport_of("auto", device="cuda", encrypts=True, tls="on").reads() is None
    monkeypatch.setattr(nixl_setup, "_PACKAGES", ("nixl_of_nowhere",))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match=r"(?s)balancer\.migration_transport.*nixl_of_nowhere.*expertmesh\[nixl\]"):
        transport_of("nixl")
    assert transport_of("auto", device="cuda").reads() is None
    assert "come from other ranks by tcp: balancer.migration_transport" in caplog.text
