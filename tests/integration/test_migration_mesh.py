"""Experts move between real rank processes while tokens are generated: never another token, whatever dies."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import mesh_pb2
from support import mesh_state, reference
from support.mesh import demo_prompts, generate_all, greedy_request, mesh_config
from support.nixl import NIXL_IS_MISSING
from support.scripted_balancer import Migrated, ViewChangedError
from support.scripted_mesh import ScriptedMesh

pytestmark = [pytest.mark.slow]

NUM_TOKENS = 32
DEMO_EOS = 0
NUM_EXPERTS = 32
SLOTS_PER_SERVER = 18  # three servers have 22 slots to spare, two of them 4
NUM_COMMITS = 60


@pytest.fixture(scope="module")
def expected() -> tuple[list[str], list[tuple[int, ...]]]:
    path = demo_model_path()
    prompts = [prompt.text for prompt in demo_prompts()][::3]
    encoded = tuple(reference.encode(path, prompt) for prompt in prompts)
    return prompts, list(reference.greedy(path, encoded, NUM_TOKENS, DEMO_EOS))


@asynccontextmanager
async def mesh_under(tmp_path: Path, **overrides: object) -> AsyncIterator[ScriptedMesh]:
    settings = {
        "attention__servers": 2,
        "expert__servers": 3,
        "expert__slots_per_server": SLOTS_PER_SERVER,
        "dataplane__timeout_s": 3.0,
        **overrides,
    }
    async with ScriptedMesh(tmp_path, mesh_config(**settings)) as mesh:
        try:
            yield mesh
        except BaseException:
            print(mesh.logs())
            raise


class Traffic:
    """Prompts over and over until it is stopped; every output has to be the reference's."""

    def __init__(self, router: str, expected: tuple[list[str], list[tuple[int, ...]]]) -> None:
        self._router = router
        self._prompts, self._tokens = expected
        self.rounds = 0

    async def run(self, stop: asyncio.Event) -> None:
        while not stop.is_set() or not self.rounds:
            await self.one_round()

    async def one_round(self) -> None:
        requests = [greedy_request(prompt, NUM_TOKENS) for prompt in self._prompts]
        outputs = await generate_all(self._router, requests, concurrency=8)
        for prompt, output, tokens in zip(self._prompts, outputs, self._tokens, strict=True):
            ids = output.token_ids
            assert tuple(ids[:-1] if ids and ids[-1] == DEMO_EOS else ids) == tokens, prompt
        self.rounds += 1


def moves(layer_slots: Sequence[int], num_ranks: int, rng: random.Random) -> list[int]:
    """Another placement: some experts move to other slots, empty ones among them; some get a replica or lose one."""
    slots = list(layer_slots)
    for _ in range(rng.randint(1, 4)):
        one, other = rng.sample(range(len(slots)), 2)
        slots[one], slots[other] = slots[other], slots[one]
    free = [slot for slot, expert in enumerate(slots) if expert == -1 or slots.count(expert) > 1]
    for slot in rng.sample(free, min(2, len(free))):
        if slots[slot] == -1 or slots.count(slots[slot]) > 1:
            slots[slot] = rng.choice([-1, rng.randrange(NUM_EXPERTS)])
    # No two replicas of an expert on one rank.
    width = len(slots) // num_ranks
    for first in range(0, len(slots), width):
        seen: set[int] = set()
        for slot in range(first, first + width):
            if slots[slot] in seen and slots.count(slots[slot]) > 1:
                slots[slot] = -1
            seen.add(slots[slot])
    return slots


def changing(mesh: ScriptedMesh, rng: random.Random) -> Iterator[tuple[int, list[int]]]:
    """Layers in turn with a placement that differs from the one that runs."""
    num_ranks = sum(rank.role == mesh_pb2.ROLE_EXPERT for rank in mesh.balancer.view.ranks)
    layers = [placement.layer for placement in mesh.balancer.view.placement]
    while True:
        for layer in layers:
            old = mesh.balancer.placement(layer)
            new = moves(old, num_ranks, rng)
            if new != old and len(set(new) - {-1}) == NUM_EXPERTS:
                yield layer, new


async def test_every_token_is_right_while_experts_move(
    tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]]
) -> None:
    async with mesh_under(tmp_path) as mesh:
        stop = asyncio.Event()
        traffic = Traffic(mesh.router, expected)
        done: list[Migrated] = []
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run(stop))
            for layer, slots in changing(mesh, random.Random(1)):
                done.append(await mesh.balancer.migrate(layer, slots))
                if len(done) == NUM_COMMITS:
                    break
            stop.set()
        assert [migrated.step for migrated in done] == sorted(migrated.step for migrated in done)
        assert sum(status.from_checkpoint for migrated in done for status in migrated.staged) == 0
        assert mesh.balancer.view.number == 1
        report(done, traffic.rounds)


async def test_an_idle_mesh_switches_at_once(tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]]) -> None:
    async with mesh_under(tmp_path, dataplane__idle_tick_s=30.0) as mesh:
        done = []
        for layer, slots in changing(mesh, random.Random(2)):
            done.append(await mesh.balancer.migrate(layer, slots))
            if len(done) == 10:
                break
        assert max(migrated.commit_s for migrated in done) < 5  # far from the idle tick
        await Traffic(mesh.router, expected).one_round()
        report(done, 1)
        for server_id in ("attention-1", "expert-2"):
            registration = await mesh.balancer.reconnected(server_id)
            assert registration.view == mesh.balancer.view  # as it runs, so that a balancer without state can adopt it


async def test_a_source_follows_its_quota(tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]]) -> None:
    """A layer of which two expert servers hold every expert; each attention server is given other shares."""
    quotas = {"attention-0": [0.8, 0.2], "attention-1": [0.35, 0.65]}
    settings = {"expert__servers": 2, "expert__slots_per_server": NUM_EXPERTS, "balancer__stats_interval_s": 0.1}
    async with mesh_under(tmp_path, **settings) as mesh:
        balancer = mesh.balancer
        plan = balancer.make_plan(3, [*range(NUM_EXPERTS)] * 2)
        for server_id, shares in quotas.items():
            plan.placement.source_quotas.add(server_id=server_id, rank_share=shares)
        balancer.announce(plan)
        await balancer.until(plan, mesh_pb2.MIGRATION_PHASE_STAGED)
        await balancer.commit(plan)
        await Traffic(mesh.router, expected).one_round()
        loads = await balancer.until_sent(3, plan.placement.version, 1000)
        for server_id, load_G in loads.items():
            first = sum(load_G[:NUM_EXPERTS]) / sum(load_G)
            assert first == pytest.approx(quotas[server_id][0], abs=0.06), (server_id, sum(load_G))
        wrong = balancer.make_plan(3, [*range(NUM_EXPERTS)] * 2)
        wrong.placement.source_quotas.add(server_id="attention-0", rank_share=[1.0])
        balancer.announce(wrong)
        with pytest.raises(AssertionError, match="2 expert ranks need as many shares"):
            await balancer.until(wrong, mesh_pb2.MIGRATION_PHASE_STAGED)
        await Traffic(mesh.router, expected).one_round()


@pytest.mark.parametrize(
    ("victim", "transport"),
    [("source", "tcp" if NIXL_IS_MISSING else "nixl"), ("destination", "tcp"), ("bystander", "tcp")],
)
async def test_a_rank_is_killed_in_the_middle_of_a_transfer(
    tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]], victim: str, transport: str
) -> None:
    settings = {"balancer__migration_transport": transport, "telemetry__metrics_port": 0}
    async with mesh_under(tmp_path, **settings) as mesh:
        balancer = mesh.balancer
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            traffic = Traffic(mesh.router, expected)
            task = group.create_task(traffic.run(stop))
            for number, (layer, slots) in enumerate(changing(mesh, random.Random(3))):
                await balancer.migrate(layer, slots)
                if number == 3:
                    break
            layer, slots, named = one_transfer(mesh)
            name = named.get(victim, "expert-2")
            # The victim stands still before the plan comes, so the others are in the middle of it when it dies.
            os.kill(mesh.pid(name), signal.SIGSTOP)
            plan = balancer.make_plan(layer, slots)
            balancer.announce(plan)
            await asyncio.sleep(0.2)  # whatever the others do with the plan, they have begun to
            os.kill(mesh.pid(name), signal.SIGKILL)
            with pytest.raises(ViewChangedError):
                await balancer.until(plan, mesh_pb2.MIGRATION_PHASE_STAGED)
            await balancer.wait_serving(2)
            assert not task.done()
            # The old view's plan is void, and the next view migrates as the first one did.
            ranks = [rank.server_id for rank in balancer.view.ranks if rank.role == mesh_pb2.ROLE_EXPERT]
            before = mesh_state.weights_that_came(mesh, ranks)
            await balancer.migrate(layer, [*reversed(balancer.placement(layer))])
            came = mesh_state.weights_that_came(mesh, ranks)
            stop.set()
        assert len(balancer.view.ranks) == 4
        assert balancer.view.number == 2
        assert [*came] == [transport]
        assert came[transport] > before[transport]


async def test_the_leader_is_killed_while_a_commit_goes_round(
    tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]]
) -> None:
    async with mesh_under(tmp_path) as mesh:
        balancer = mesh.balancer
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            traffic = Traffic(mesh.router, expected)
            group.create_task(traffic.run(stop))
            layer, slots = next(changing(mesh, random.Random(4)))
            plan = balancer.make_plan(layer, slots)
            balancer.announce(plan)
            await balancer.until(plan, mesh_pb2.MIGRATION_PHASE_STAGED)
            os.kill(mesh.pid("attention-0"), signal.SIGSTOP)
            committing = asyncio.create_task(balancer.commit(plan))
            await asyncio.sleep(0.05)  # the others have heard the commit, the leader has not
            os.kill(mesh.pid("attention-0"), signal.SIGKILL)
            with pytest.raises(ViewChangedError):
                await committing
            await balancer.wait_serving(2)
            await balancer.migrate(layer, [*reversed(balancer.placement(layer))])
            stop.set()
        assert len(balancer.view.ranks) == 4


async def test_micro_batches_while_experts_move_and_a_rank_is_killed(
    tmp_path: Path, expected: tuple[list[str], list[tuple[int, ...]]]
) -> None:
    """Steps of two micro-batches; switches are between steps, and what broke in the middle of one is run again."""
    settings = {"expert__servers": 2, "expert__slots_per_server": NUM_EXPERTS, "telemetry__metrics_port": 0}
    async with mesh_under(tmp_path, **settings, dataplane__micro_batches=2) as mesh:
        balancer, stop, traffic = mesh.balancer, asyncio.Event(), Traffic(mesh.router, expected)
        await traffic.one_round()
        split = mesh_state.metrics(mesh, "expert-0")["expertmesh_split_steps_total"]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(traffic.run(stop))
            for layer, slots in itertools.islice(changing(mesh, random.Random(5)), 6):
                await balancer.migrate(layer, slots)
            os.kill(mesh.pid("expert-1"), signal.SIGKILL)
            await balancer.wait_serving(2)
            assert not task.done()
            await balancer.migrate(layer, [*reversed(balancer.placement(layer))])
            stop.set()
        assert len(balancer.view.ranks) == 3
        assert 0 < split < mesh_state.metrics(mesh, "expert-0")["expertmesh_split_steps_total"]


def one_transfer(mesh: ScriptedMesh) -> tuple[int, list[int], dict[str, str]]:
    """A placement that differs in one slot: an expert of expert-0 gets a replica on expert-1."""
    layer = mesh.balancer.view.placement[0].layer
    slots = mesh.balancer.placement(layer)
    width = mesh.balancer.view.slots_per_rank
    own, other = slots[:width], slots[width : 2 * width]
    expert = next(e for e in own if e >= 0 and slots.count(e) == 1)
    slots[width + other.index(-1)] = expert
    return layer, slots, {"source": "expert-0", "destination": "expert-1"}


def report(done: Sequence[Migrated], rounds: int) -> None:
    """Seen with ``pytest -s``: what it takes."""
    staging = sorted(max(status.seconds for status in migrated.staged) for migrated in done)
    switching = sorted(max(status.seconds for status in migrated.committed) for migrated in done)
    commits = sorted(migrated.commit_s for migrated in done)
    middle, last = len(done) // 2, -1
    print(
        f"{len(done)} migrations in {rounds} rounds; milliseconds, median and worst: "
        f"staging {1e3 * staging[middle]:.1f} {1e3 * staging[last]:.1f}, "
        f"commit to last answer {1e3 * commits[middle]:.1f} {1e3 * commits[last]:.1f}, "
        f"switch {1e3 * switching[middle]:.3f} {1e3 * switching[last]:.3f}"
    )
