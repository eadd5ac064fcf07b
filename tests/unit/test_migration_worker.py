"""Migrations on ranks with real slots, a real side group and a lockstep played by the test."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from expertmesh.expert_server.slots import Slots
from expertmesh.mesh import sidegroup
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.halves import ExpertWeights
from expertmesh.mesh.migration import MigrationContext, Migrations
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.side_transfers import Patience, TransferError, checksum, checksum_in_place
from expertmesh.mesh.telemetry import Metrics, disabled_telemetry
from expertmesh.v1 import mesh_pb2
from support.checkpoints import write_checkpoint
from support.migration import make_plan, make_view
from support.migration_ranks import COMMITTED, EMPTIED, FAILED, LAYERS, NEW, NUM_SLOTS, OLD, STAGED, Rank, Ranks
from support.nixl import TRANSPORTS, needs_nixl
from support.side_plans import until

pytestmark = [pytest.mark.slow]

WAYS = ("tcp", "nixl")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", mlp_only_layers=[0])


both_ways = pytest.mark.parametrize("ranks", TRANSPORTS, indirect=True)


@pytest.fixture
def ranks(path: Path, request: pytest.FixtureRequest) -> Iterator[Ranks]:
    made = Ranks(path, getattr(request, "param", "tcp"))
    made.start()
    yield made
    made.close()


def test_the_next_view_does_not_wait_for_a_disk_that_hangs(ranks: Ranks) -> None:
    rank = ranks.ranks[1]
    rank.checkpoint.hold.clear()
    rank.hear(plan=ranks.plan(1, NEW, from_checkpoint=True))
    assert rank.checkpoint.asked.wait(10)
    started_s = time.monotonic()
    rank.migrations.call_off()
    assert time.monotonic() - started_s < 5.0, "it waited for the disk"


def counted(rank: Rank, family: str, **labels: str) -> float:
    return float(getattr(rank.metrics, family).labels(**labels).read())


@both_ways
def test_weights_come_from_peers_and_from_own_slots(ranks: Ranks) -> None:
    statuses = ranks.migrate(1, NEW)
    assert ranks.reads() == []
    bytes_of_expert = ranks.ranks[0].spec.bytes_per_expert
    assert [status.bytes for status in statuses] == [0, 4 * bytes_of_expert, 2 * bytes_of_expert]
    ranks.assert_runs(2, OLD)
    assert ranks.view.versions == {1: 2, 2: 1}
    for rank in ranks.ranks:
        status = rank.await_status(1)
        assert (status.phase, status.step) == (COMMITTED, 1)
    ranks.migrate(1, EMPTIED)
    ranks.migrate(1, OLD)  # expert 3's slot was blank: it comes back from its replica
    assert ranks.reads() == []
    routing = ranks.ranks[0].routing[1]
    assert routing.choose(torch.tensor([[3, 5]])).tolist() == [[3, 7]]
    came = {way: sum(counted(rank, "migration_peer_bytes", transport=way) for rank in ranks.ranks) for way in WAYS}
    assert came.pop(ranks.transport) == 5 * bytes_of_expert
    assert set(came.values()) == {0}


def test_routing_follows_at_the_switch_and_not_before(ranks: Ranks) -> None:
    moved = [1, 0, *OLD[2:]]
    plan = ranks.plan(1, moved)
    ranks.announce(plan)
    chosen = torch.tensor([[0, 1]])
    assert ranks.ranks[0].routing[1].choose(chosen).tolist() == [[0, 1]]
    ranks.commit(plan)
    assert ranks.ranks[0].routing[1].choose(chosen).tolist() == [[1, 0]]


def test_weights_come_from_the_checkpoint_when_the_plan_says_so(ranks: Ranks) -> None:
    statuses = ranks.migrate(2, NEW, from_checkpoint=True)
    assert ranks.reads() == [(2, 0), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert [status.from_checkpoint for status in statuses] == [0, 0, 0]  # nothing had to fall back


@both_ways
def test_two_layers_at_a_time_and_one_step_for_both(ranks: Ranks) -> None:
    plans = [ranks.plan(1, NEW), ranks.plan(2, NEW)]
    for plan in plans:
        for rank in ranks.ranks:
            rank.hear(plan=plan)
    for plan, rank in itertools.product(plans, ranks.ranks):
        assert rank.await_status(plan.id).phase == STAGED
    ranks.commit(*reversed(plans))
    ranks.assert_runs(1, NEW)
    ranks.assert_runs(2, NEW)


def test_nobody_switches_while_one_rank_has_not_heard(ranks: Ranks) -> None:
    plan = ranks.plan(1, NEW)
    ranks.announce(plan)
    for rank in ranks.ranks[:2]:
        rank.hear(commit=mesh_pb2.MigrationCommit(id=plan.id))
    for _ in range(3):
        ranks.agree()
    ranks.assert_runs(1, OLD)
    ranks.ranks[2].hear(commit=mesh_pb2.MigrationCommit(id=plan.id))
    ranks.agree()
    ranks.assert_runs(1, NEW)


def test_an_abort_changes_nothing_and_frees_the_memory(ranks: Ranks) -> None:
    plan = ranks.plan(1, NEW)
    ranks.announce(plan)
    for rank in ranks.ranks:
        rank.hear(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="for the test"))
        rank.hear(commit=mesh_pb2.MigrationCommit(id=plan.id))
    ranks.agree()
    ranks.assert_runs(1, OLD)
    for rank in ranks.ranks:
        assert rank.await_status(plan.id).phase == FAILED  # the answer to a commit that comes after all
    ranks.migrate(1, NEW)


@both_ways
def test_an_abort_in_the_middle_ends_the_waits(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 2 never gets the plan: rank 1 waits for its weights, then hears that it is off."""
    take, waits = sidegroup.SideGroup.take, threading.Event()

    def taking(side: sidegroup.SideGroup, patience: Patience) -> dict[int, TransferError]:
        waits.set()
        return take(side, patience)

    monkeypatch.setattr(sidegroup.SideGroup, "take", taking)
    plan = ranks.plan(1, NEW, timeout_s=60.0)
    for rank in ranks.ranks[:2]:
        rank.hear(plan=plan)
    assert waits.wait(10)
    ranks.ranks[1].hear(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="for the test"))
    ranks.ranks[0].hear(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="for the test"))
    statuses = ranks.migrate(1, NEW)
    assert all(status.from_checkpoint == 0 for status in statuses)  # the side group is as good as new
    assert ranks.reads() == []


@both_ways
def test_a_source_that_never_hears_of_the_plan(ranks: Ranks) -> None:
    plan = ranks.plan(1, NEW, timeout_s=2.0)
    for rank in ranks.ranks[:2]:
        rank.hear(plan=plan)
    status = ranks.ranks[1].await_status(plan.id)
    # Expert 4 comes from the checkpoint after half of the time, and nobody takes expert 0 from this rank.
    assert ranks.ranks[1].checkpoint.reads == [(1, 4)]
    assert (status.phase, status.from_checkpoint) == (STAGED, 1)
    for rank in ranks.ranks:
        rank.hear(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="late"))
    ranks.ranks[1].checkpoint.reads.clear()
    ranks.migrate(1, NEW)
    assert ranks.reads() == []


@needs_nixl
@pytest.mark.parametrize("ranks", ["nixl"], indirect=True)
def test_a_read_that_is_late_has_its_memory_to_itself(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint stands in, elsewhere; what the read writes into is spare again when it has ended."""
    source, destination = ranks.ranks[2].reads, ranks.ranks[1]
    assert source is not None
    assert destination.slots is not None
    monkeypatch.setattr(source, "lend", lambda *_: None)  # so it does not answer
    monkeypatch.setattr(sidegroup, "_LAST_READS_S", 0.01)
    replica = [0, 1, 2, 3, 4, -1, 4, 5, 6, 7, -1, -1]
    statuses = ranks.migrate(1, replica, timeout_s=4.0)
    assert [status.from_checkpoint for status in statuses] == [0, 1, 0]
    assert ranks.reads() == [(1, 4)]
    staging = destination.slots.staging
    until(lambda: staging.used == 1, "the migration's memory was not given back")
    with source._agent.lending():
        until(lambda: staging.used == 0, "the read's memory was not given back")
    ranks.assert_runs(1, replica)


@both_ways
def test_damaged_weights_come_from_the_checkpoint(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    for right in (checksum, checksum_in_place):

        def first_wrong(weights: ExpertWeights, right: Callable[[ExpertWeights], int] = right) -> int:
            return right(weights) + (next(calls) == 0)

        monkeypatch.setattr(sidegroup, right.__name__, first_wrong)
    statuses = ranks.migrate(1, NEW)
    assert sum(status.from_checkpoint for status in statuses) == 1
    assert len(ranks.reads()) == 1
    assert sum(counted(rank, "migration_fallbacks", cause="checksum") for rank in ranks.ranks) == 1


@both_ways
def test_a_broken_side_group_is_replaced_by_the_checkpoint(ranks: Ranks) -> None:
    ranks.migrate(2, NEW)
    side = ranks.ranks[1].side
    assert side is not None
    for link in side._links.values():
        link.sock.shutdown(socket.SHUT_RDWR)
    statuses = ranks.migrate(1, NEW)
    assert [status.from_checkpoint for status in statuses] == [0, 1, 2]
    assert ranks.reads() == [(1, 0), (1, 3), (1, 4)]
    ranks.close()  # the worker counts behind the switch
    assert sum(counted(rank, "migrated_slots", source="checkpoint") for rank in ranks.ranks) == 3
    assert sum(counted(rank, "migration_fallbacks", cause="broken") for rank in ranks.ranks) == 3
    assert [counted(rank, "rank_migrations", outcome="committed") for rank in ranks.ranks] == [2, 2, 2]


def test_a_checkpoint_that_cannot_be_read_fails_the_plan_only(ranks: Ranks) -> None:
    plan = ranks.plan(1, NEW, from_checkpoint=True)
    ranks.ranks[2].checkpoint.error = OSError("the disk is gone")
    statuses = ranks.announce(plan)
    assert [status.phase for status in statuses] == [STAGED, STAGED, FAILED]
    assert "the disk is gone" in statuses[2].reason
    for rank in ranks.ranks:
        rank.hear(abort=mesh_pb2.MigrationAbort(id=plan.id, reason="failed"))
    ranks.migrate(1, NEW)


@both_ways
def test_staging_memory_is_bounded(ranks: Ranks) -> None:
    slots = ranks.ranks[1].slots
    assert slots is not None
    taken = slots.reserve(2 * NUM_SLOTS - 1)
    plan = ranks.plan(1, NEW, timeout_s=0.2)
    status = ranks.announce(plan)[1]
    assert status.phase == FAILED
    assert "11 of the 12 places are taken" in status.reason
    slots.release(taken)


def test_plans_that_do_not_fit_are_refused_with_a_reason(ranks: Ranks) -> None:
    plan = ranks.plan(1, NEW)
    plan.view_number = 99
    for status in ranks.announce(plan):
        assert status.phase == FAILED
        assert "view 99" in status.reason
    quotas = ranks.plan(1, NEW)
    quotas.placement.source_quotas.add(server_id="a0", rank_share=[2.0, -1.0])
    status = ranks.announce(quotas)[0]  # of the rank that routes
    assert status.phase == FAILED
    assert "quota" in status.reason


@both_ways
def test_a_view_that_ends_in_the_middle(ranks: Ranks) -> None:
    """The fixture's end checks that threads end and memory is given back."""
    staged, held = ranks.plan(1, NEW), ranks.plan(2, NEW, from_checkpoint=True)
    ranks.announce(staged)
    ranks.ranks[1].checkpoint.hold.clear()
    for rank in ranks.ranks:
        rank.hear(plan=held)


def test_a_lone_rank_has_no_side_group(path: Path) -> None:
    view = make_view("b", {layer: [*range(8)] for layer in LAYERS}, num_slots=8)
    spec = load_spec(ModelConfig(path=path))
    slots = Slots(spec, Checkpoint(path), 8, Metrics(role="both").slots_loaded)
    slots.load(view.local_slots())
    routing = RoutingTables(view.proto.placement, spec.num_experts, Topology.of(view))
    reported = SimpleNamespace(statuses=[], staged=threading.Event())

    def report(message: mesh_pb2.JoinRequest) -> None:
        reported.statuses.append(message.migration)
        reported.staged.set()

    migrations = Migrations(
        MigrationContext(
            view=view,
            num_experts=spec.num_experts,
            experts=slots,
            routing=routing,
            side=None,
            report=report,
            wake=lambda: None,
            telemetry=disabled_telemetry(),
        )
    )
    migrations.start()
    plan = make_plan(1, view, 1, [7, 6, 5, 4, 3, 2, 1, 0])
    migrations.hear(mesh_pb2.JoinResponse(plan=plan))
    assert reported.staged.wait(20)
    migrations.hear(mesh_pb2.JoinResponse(commit=mesh_pb2.MigrationCommit(id=1)))
    migrations.switch(migrations.listed(), 3)
    migrations.close()
    assert slots.slots(1) == (7, 6, 5, 4, 3, 2, 1, 0)
    assert [status.phase for status in reported.statuses] == [STAGED, COMMITTED]
    assert routing[1].choose(torch.tensor([[0, 7]])).tolist() == [[7, 0]]
