"""What an attention half counts and reports: against counting token by token."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.mesh import statistics
from expertmesh.mesh.placement import Ints, Topology
from expertmesh.mesh.recorder import TraceRecorder
from expertmesh.mesh.reporting import RoutingObserver, RoutingReporter
from expertmesh.mesh.statistics import RoutingStatistics
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

LAYERS = (1, 4, 5)
NUM_EXPERTS, TOP_K = 6, 3
TOPOLOGY = Topology(slots_per_rank=3, node_R=(0, 0, 1))
NUM_SLOTS = 9


def routed(seed: int, tokens: int) -> tuple[Ints, Ints]:
    """Experts [L, T, K], distinct in a token, and slots [L, T, K] as if expert e were in the slots e and e + 3."""
    generator = np.random.default_rng(seed)
    expert_LTK = generator.permuted(np.tile(np.arange(NUM_EXPERTS), (len(LAYERS), tokens, 1)), axis=2)[..., :TOP_K]
    return expert_LTK, expert_LTK + 3 * generator.integers(0, 2, expert_LTK.shape)


def counted(versions: list[int] | None = None) -> RoutingStatistics:
    made = RoutingStatistics(LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)
    made.enter_view(1, versions or [1, 1, 1], TOPOLOGY)
    return made


def taken(made: RoutingStatistics) -> list[mesh_pb2.LayerStats]:
    counts = made.take()
    assert counts is not None
    return [layer for report in made.reports(counts, itertools.count(1)) for layer in report.layers]


def expected(expert_LTK: Ints, slot_LTK: Ints, index: int) -> mesh_pb2.LayerStats:
    """Token by token."""
    load, pairs, slots = (
        [0] * NUM_EXPERTS,
        dict.fromkeys(itertools.combinations(range(NUM_EXPERTS), 2), 0),
        [0] * NUM_SLOTS,
    )
    ranks = nodes = 0
    for experts, slot_row in zip(expert_LTK[index].tolist(), slot_LTK[index].tolist(), strict=True):
        for expert in experts:
            load[expert] += 1
        for pair in itertools.combinations(sorted(experts), 2):
            pairs[pair] += 1
        for slot in slot_row:
            slots[slot] += 1
        visited = {slot // TOPOLOGY.slots_per_rank for slot in slot_row}
        ranks += len(visited)
        nodes += len({TOPOLOGY.node_R[rank] for rank in visited})
    tokens = expert_LTK.shape[1]
    return mesh_pb2.LayerStats(
        layer=LAYERS[index],
        version=1,
        tokens=tokens,
        load=load,
        coactivation=list(pairs.values()),
        rank_visits=ranks,
        node_visits=nodes,
        slot_load=slots,
        visit_tokens=tokens,
    )


@settings(max_examples=20)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_counting_token_by_token(steps: list[int], seed: int) -> None:
    expert_LTK, slot_LTK = routed(seed, sum(steps))
    made = counted()
    for first, tokens in zip(np.cumsum([0, *steps[:-1]]), steps, strict=True):
        part = slice(first, first + tokens)
        made.add([1, 1, 1], expert_LTK[:, part], slot_LTK[:, part])
    assert taken(made) == [expected(expert_LTK, slot_LTK, index) for index in range(len(LAYERS))]
    assert made.take() is None


def test_a_layer_with_many_experts_is_counted_in_passes(monkeypatch: Any) -> None:
    expert_LTK, slot_LTK = routed(3, 50)
    whole, passes = counted(), counted()
    whole.add([1, 1, 1], expert_LTK, slot_LTK)
    wanted = taken(whole)
    monkeypatch.setattr(statistics, "_CELLS_AT_ONCE", 1)
    monkeypatch.setattr(statistics, "_REPORT_BYTES", 1)
    passes.add([1, 1, 1], expert_LTK, slot_LTK)
    counts = passes.take()
    assert counts is not None
    reports = list(passes.reports(counts, itertools.count(7)))
    assert [report.sequence for report in reports] == [7, 8, 9]
    assert [layer for report in reports for layer in report.layers] == wanted


def test_visits_begin_again_with_a_placement_version() -> None:
    expert_LTK, slot_LTK = routed(1, 40)
    made = counted()
    made.add([1, 1, 1], expert_LTK[:, :30], slot_LTK[:, :30])
    made.add([1, 2, 1], expert_LTK[:, 30:], slot_LTK[:, 30:])
    layers = taken(made)
    assert [layer.version for layer in layers] == [1, 2, 1]
    assert [layer.tokens for layer in layers] == [40, 40, 40]
    assert [layer.visit_tokens for layer in layers] == [40, 10, 40]
    alone = expected(expert_LTK[:, 30:], slot_LTK[:, 30:], 1)
    whole = expected(expert_LTK, slot_LTK, 1)
    assert (layers[1].rank_visits, list(layers[1].slot_load)) == (alone.rank_visits, list(alone.slot_load))
    assert (list(layers[1].load), list(layers[1].coactivation)) == (list(whole.load), list(whole.coactivation))


def test_a_new_view_keeps_the_load_and_drops_the_visits() -> None:
    expert_LTK, slot_LTK = routed(2, 20)
    made = counted()
    made.add([1, 1, 1], expert_LTK, slot_LTK)
    made.enter_view(2, [1, 1, 1], Topology(slots_per_rank=9, node_R=(0,)))
    counts = made.take()
    assert counts is not None
    (report,) = made.reports(counts, itertools.count(1))
    assert report.view_number == 2
    assert list(report.layers[0].load) == list(expected(expert_LTK, slot_LTK, 0).load)
    assert (report.layers[0].visit_tokens, report.layers[0].rank_visits) == (0, 0)


def observer() -> tuple[RoutingStatistics, RoutingObserver]:
    made = RoutingStatistics(LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K)
    watching = RoutingObserver(made, TraceRecorder(len(LAYERS), TOP_K), LAYERS)
    watching.enter_view(view())
    return made, watching


def view() -> ViewInfo:
    ranks = [mesh_pb2.Rank(rank=0, role=mesh_pb2.ROLE_ATTENTION, node="n0")]
    ranks += [
        mesh_pb2.Rank(rank=1 + i, role=mesh_pb2.ROLE_EXPERT, node=node) for i, node in enumerate(["n1", "n1", "n0"])
    ]
    placed = [mesh_pb2.LayerPlacement(layer=layer, version=1, slots=[0] * NUM_SLOTS) for layer in LAYERS]
    return ViewInfo(mesh_pb2.View(number=1, ranks=ranks, slots_per_rank=3, placement=placed), 0)


def see(watching: RoutingObserver, expert_LTK: Ints, slot_LTK: Ints) -> None:
    watching.begin()
    for index in range(len(LAYERS)):
        watching.observe(1, torch.from_numpy(expert_LTK[index]), torch.from_numpy(slot_LTK[index]))


def test_a_step_that_is_run_again_counts_once() -> None:
    made, watching = observer()
    lost, kept = routed(1, 5), routed(2, 5)
    watching.begin()
    watching.observe(
        1, torch.from_numpy(lost[0][0]), torch.from_numpy(lost[1][0])
    )  # the view broke in the second layer
    see(watching, *kept)
    assert made.take() is None
    watching.commit()
    assert [layer.tokens for layer in taken(made)] == [5, 5, 5]
    see(watching, *lost)  # broken after the last layer
    assert made.take() is None


def test_two_micro_batches_count_as_one_step() -> None:
    whole, watching_whole = observer()
    split, watching_split = observer()
    expert_LTK, slot_LTK = routed(4, 9)
    see(watching_whole, expert_LTK, slot_LTK)
    watching_split.begin()
    for index in range(len(LAYERS)):
        for part in (slice(0, 5), slice(5, 9)):
            chosen, sent = torch.from_numpy(expert_LTK[index, part]), torch.from_numpy(slot_LTK[index, part])
            watching_split.observe(1, chosen, sent, goes_on=part.start > 0)
    watching_whole.commit()
    watching_split.commit()
    assert taken(split) == taken(whole)


@dataclass
class FakeOutbox:
    is_drained: bool = True
    sent: list[mesh_pb2.JoinRequest] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, message: mesh_pb2.JoinRequest) -> None:
        self.sent.append(message)
        self.changed.set()

    async def next(self) -> mesh_pb2.JoinRequest:
        async with asyncio.timeout(10):
            await self.changed.wait()
        self.changed.clear()
        return self.sent[-1]


async def test_what_could_not_be_sent_comes_with_the_next_report() -> None:
    reporter = RoutingReporter(LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, interval_s=0.01)
    outbox = FakeOutbox(is_drained=False)
    reporter.observer.enter_view(view())
    task = asyncio.create_task(reporter.run(outbox))
    try:
        for seed in (1, 2):
            see(reporter.observer, *routed(seed, 10))
            reporter.observer.commit()
        outbox.is_drained = True
        first = await outbox.next()
        see(reporter.observer, *routed(3, 4))
        reporter.observer.commit()
        second = await outbox.next()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert [(m.stats.sequence, m.stats.layers[0].tokens) for m in (first, second)] == [(1, 20), (2, 4)]
    assert len(outbox.sent) == 2


async def test_a_heartbeat_of_the_same_period_starves_no_report() -> None:
    interval_s = 0.2
    loop = asyncio.get_running_loop()

    class InPhase(FakeOutbox):
        """Whoever asks it once an interval finds the heartbeat in it."""

        asked_s = 0.0

        @property
        def is_drained(self) -> bool:
            asked_s, self.asked_s = self.asked_s, loop.time()
            return self.asked_s - asked_s < 0.9 * interval_s

        @is_drained.setter
        def is_drained(self, value: bool) -> None:
            pass

    reporter = RoutingReporter(LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, interval_s=interval_s)
    outbox = InPhase()
    reporter.observer.enter_view(view())
    see(reporter.observer, *routed(1, 10))
    reporter.observer.commit()
    task = asyncio.create_task(reporter.run(outbox))
    try:
        assert (await outbox.next()).stats.layers[0].tokens == 10
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_recording_is_sent_until_it_is_done() -> None:
    reporter = RoutingReporter(LAYERS, num_experts=NUM_EXPERTS, top_k=TOP_K, interval_s=60)
    outbox = FakeOutbox()
    reporter.observer.enter_view(view())
    task = asyncio.create_task(reporter.run(outbox))
    try:
        reporter.control(mesh_pb2.RecordControl(id=5, max_tokens=7))
        expert_LTK, slot_LTK = routed(1, 10)
        see(reporter.observer, expert_LTK, slot_LTK)
        reporter.observer.commit()
        chunk = (await outbox.next()).trace
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert (chunk.record_id, chunk.num_tokens, chunk.top_k, chunk.done) == (5, 7, TOP_K, True)
    topk_LTK = np.frombuffer(chunk.topk, "<i2").reshape(len(LAYERS), 7, TOP_K)
    np.testing.assert_array_equal(topk_LTK, expert_LTK[:, :7])


class DeviceCounts:
    """Counts of a device that have come when ``is_there`` says so."""

    def __init__(self, load: int) -> None:
        self.is_there = False
        self._load = load

    def fetch(self) -> tuple[Any, Any, Any]:
        shape = len(LAYERS), NUM_EXPERTS, NUM_EXPERTS
        return np.full(shape, self._load), np.full((len(LAYERS), NUM_SLOTS), self._load), np.full((len(LAYERS), 2), 1)


class Device:
    """Hands out the counts of 1, 2, 3 ... in turn."""

    def __init__(self) -> None:
        self.sent: list[DeviceCounts] = []

    def take_totals(self) -> DeviceCounts:
        self.sent.append(DeviceCounts(len(self.sent) + 1))
        return self.sent[-1]


def test_what_a_device_counted_comes_when_it_is_there_under_the_placements_it_was_counted_under() -> None:
    made = counted()
    observer = RoutingObserver(made, TraceRecorder(len(LAYERS), TOP_K), LAYERS)
    device: Any = Device()
    versions = dict.fromkeys(LAYERS, 1)
    observer.commit_on_device(versions, 5, device)
    observer.commit_on_device(versions, 7, device)
    assert len(device.sent) == 1
    assert made.take() is None, "it is on its way"
    device.sent[0].is_there = True
    observer.commit_on_device(versions, 0, device)
    first = taken(made)
    assert [layer.tokens for layer in first] == [5] * len(LAYERS)
    assert list(first[0].load) == [1] * NUM_EXPERTS
    assert (first[0].rank_visits, first[0].node_visits, first[0].visit_tokens) == (1, 1, 5)
    observer.flush_device(versions, device)
    observer.flush_device(versions, device)
    assert len(device.sent) == 2, "nothing has been counted since"
    versions[LAYERS[0]] = 2
    observer.commit_on_device(versions, 3, device)
    observer.flush_device(versions, device)
    assert made.take() is None, "nobody waited for it"
    device.sent[2].is_there = True
    observer.commit_on_device(versions, 0, device)
    assert made.take() is None, "they are counted in their order"
    device.sent[1].is_there = True
    observer.commit_on_device(versions, 0, device)
    found = [(layer.tokens, layer.version, layer.load[0]) for layer in taken(made)]
    assert found == [(10, 2, 5), (10, 1, 5), (10, 1, 5)]
