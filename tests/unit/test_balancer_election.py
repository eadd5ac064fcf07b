"""Who leads, with time injected and a store in memory. ``Process`` can be killed, stopped and continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.balancer.election import Election, Leader, Term
from expertmesh.balancer.keyvalue import Guard
from support.memory_kv import FakeTime, MemoryKv

KEY = "/mesh/leader"
LEASE_S = 2


class Process:
    """Stands for election again and again, and renews its lease while it leads."""

    def __init__(self, kv: MemoryKv, name: str) -> None:
        self.name = name
        self.terms: list[Term] = []
        self.reasons: list[str] = []
        self._kv = kv
        self._runs = asyncio.Event()
        self._runs.set()
        self.election = Election(
            kv, key=KEY, server_id=name, address=f"{name}:1", lease_s=LEASE_S, clock=kv.time, sleep=self._sleep
        )
        self._task = asyncio.create_task(self._run())

    async def _sleep(self, seconds: float) -> None:
        await self._kv.time.sleep(seconds)
        await self._runs.wait()

    async def _run(self) -> None:
        while True:
            term = await self.election.win()
            self.terms.append(term)
            self.reasons.append(await term.keep())

    @property
    def leads(self) -> bool:
        return bool(self.terms) and self.terms[-1].holds()

    def stand_still(self) -> None:
        """SIGSTOP: nothing of it runs any more; what it asked of the store before may still come about."""
        self._runs.clear()

    def go_on(self) -> None:
        self._runs.set()

    async def kill(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def processes(kv: MemoryKv, *names: str) -> AsyncIterator[list[Process]]:
    made = [Process(kv, name) for name in names]
    try:
        yield made
    finally:
        for process in made:
            await process.kill()


async def test_a_leader_that_is_killed_is_followed_when_its_lease_ends_and_not_before() -> None:
    kv = MemoryKv()
    async with processes(kv, "a", "b") as (a, b):
        await kv.time.advance(10)
        assert (a.leads, b.leads, len(a.terms)) == (True, False, 1)
        assert b.election.leader == Leader.decode(kv.entries[KEY].value)
        assert b.election.leader.address == "a:1"
        await a.kill()
        await kv.time.advance(LEASE_S - LEASE_S / 4 - 0.1)
        assert not b.leads
        await kv.time.advance(LEASE_S / 4 + 0.3)
        assert b.leads
        assert b.terms[-1].number > a.terms[-1].number


async def test_a_leader_that_stood_still_knows_that_its_term_is_over_before_it_asks_anybody() -> None:
    kv = MemoryKv()
    async with processes(kv, "a", "b") as (a, b):
        await kv.time.advance(1)
        a.stand_still()
        await kv.time.advance(10)
        assert (a.leads, b.leads) == (False, True)
        a.go_on()
        await kv.time.advance(1)
        assert (a.leads, b.leads) == (False, True)
        assert a.reasons == ["its lease of 2 s ran out"]
        assert not await kv.transact(a.terms[0].guard, puts={"/mesh/state": b"of a"})
        assert await kv.transact(b.terms[0].guard, puts={"/mesh/state": b"of b"})


async def test_without_the_store_nobody_leads_and_the_same_one_may_lead_again_at_once() -> None:
    kv = MemoryKv()
    async with processes(kv, "a") as (a,):
        await kv.time.advance(1)
        kv.down = True
        await kv.time.advance(LEASE_S - 0.6)
        assert a.leads, "its lease has not ended"
        await kv.time.advance(1)
        assert not a.leads
        assert "the store is down" in a.reasons[0]
        kv.down = False
        # etcd counts leases anew when it starts: the old key is still there.
        kv.entries[KEY] = replace(kv.entries[KEY], lease=0)
        await kv.time.advance(0.5)
        assert a.leads


async def test_a_transaction_whose_answer_is_lost_elects_nobody_by_accident() -> None:
    kv = MemoryKv(lose_answers=1)
    async with processes(kv, "a", "b") as (a, b):
        await kv.time.advance(1)
        assert a.leads
        assert not b.leads
        assert kv.entries[KEY].create_revision == a.terms[-1].number


async def test_who_resigns_is_followed_at_once() -> None:
    kv = MemoryKv()
    async with processes(kv, "a", "b") as (a, b):
        await kv.time.advance(1)
        await a.kill()
        await a.terms[-1].resign()
        assert not a.leads
        await kv.time.advance(0.1)
        assert b.leads


async def test_a_leader_whose_key_is_taken_away_steps_down() -> None:
    kv = MemoryKv()
    async with processes(kv, "a") as (a,):
        await kv.time.advance(1)
        guard = a.terms[0].guard
        await kv.transact(Guard(key=KEY, create_revision=guard.create_revision), deletes=[KEY])
        await kv.time.advance(1)
        assert a.reasons == ["somebody took the leader's key away"]
        assert a.terms[-1].number > guard.create_revision


async def test_a_key_of_a_stranger_is_waited_for_as_anybody_elses() -> None:
    kv = MemoryKv()
    await kv.transact(Guard(key=KEY, create_revision=0), puts={KEY: b"not json"})
    async with processes(kv, "a") as (a,):
        await kv.time.advance(5)
        assert not a.terms
        assert a.election.leader is not None
        assert a.election.leader.server_id == "a stranger"


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["stop", "go", "kill", "start", "down", "up", "lose"]), st.integers(0, 2), st.floats(0, 3)
    ),
    max_size=25,
)


@pytest.mark.slow
@settings(max_examples=30)
@given(ACTIONS)
def test_there_are_never_two_leaders_and_one_comes_when_all_is_well(actions: list[tuple[str, int, float]]) -> None:
    asyncio.run(_play(actions))


async def _play(actions: list[tuple[str, int, float]]) -> None:
    kv = MemoryKv(FakeTime())
    everybody: list[Process] = []
    async with processes(kv, "p0", "p1", "p2") as current:
        everybody += current

        def check() -> None:
            leaders = [process for process in everybody if process.leads]
            assert len(leaders) <= 1, f"{[process.name for process in leaders]} lead"

        for action, index, seconds in actions:
            process = current[index]
            if action == "stop":
                process.stand_still()
            elif action == "go":
                process.go_on()
            elif action == "kill":
                await process.kill()
            elif action == "start":
                await process.kill()
                current[index] = Process(kv, process.name)
                everybody.append(current[index])
            elif action in ("down", "up"):
                kv.down = action == "down"
            else:
                kv.lose_answers += 1
            await kv.time.advance(seconds, check)
        kv.down, kv.lose_answers = False, 0
        for index, process in enumerate(current):
            await process.kill()
            current[index] = Process(kv, process.name)
            everybody.append(current[index])
        await kv.time.advance(3 * LEASE_S, check)
        assert any(process.leads for process in current)
        numbers = [term.number for process in everybody for term in process.terms]
        assert len(set(numbers)) == len(numbers), "two terms had one number"
