"""The state in a key-value store: whole or not at all, whatever fails, and never a deposed leader's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertmesh.balancer.election import Election, Term
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.keyvalue import DeposedError, Entry, UnreachableError
from expertmesh.balancer.saver import SavedFirst, StateSaver
from expertmesh.balancer.state import DurableState, fresh_state
from expertmesh.balancer.state_etcd import EtcdState
from expertmesh.mesh.errors import UserError
from expertmesh.v1 import mesh_pb2
from support.memory_kv import MemoryKv

PREFIX = "/mesh/balancer"


def state(number: int) -> DurableState:
    return replace(fresh_state(), mesh_id=f"mesh {number}", fenced=tuple(f"incarnation {i}" for i in range(200)))


async def elect(kv: MemoryKv, name: str = "a") -> Term:
    return await Election(
        kv, key=f"{PREFIX}/leader", server_id=name, address="", lease_s=2, clock=kv.time, sleep=kv.time.sleep
    ).win()


async def test_the_next_leader_reads_what_the_last_one_wrote() -> None:
    kv = MemoryKv()
    term = await elect(kv)
    first = EtcdState(kv, PREFIX, term)
    assert await first.load() is None
    for number in (1, 2, 3):
        await first.save(state(number))
    await term.resign()
    assert await EtcdState(kv, PREFIX, await elect(kv, "b")).load() == state(3)
    assert len(await kv.list_keys(f"{PREFIX}/state/")) == 1, "old generations are deleted"


async def test_a_large_state_goes_in_parts_none_larger_than_a_request_may_be() -> None:
    kv = MemoryKv()
    term = await elect(kv)
    kv.requests.clear()
    await EtcdState(kv, PREFIX, term, part_bytes=200).save(state(1))
    assert len(kv.requests) > 2
    assert max(kv.requests) < 400, "a part and the head that names it"
    assert await EtcdState(kv, PREFIX, term).load() == state(1)


async def test_a_save_that_breaks_off_anywhere_leaves_the_old_state_whole_and_is_cleared_away_later() -> None:
    kv = MemoryKv()
    term = await elect(kv)
    keeper = EtcdState(kv, PREFIX, term, part_bytes=200)
    await keeper.save(state(1))
    num_parts = len(await kv.list_keys(f"{PREFIX}/state/"))
    for num_done in range(num_parts):
        kv.fail_after = num_done
        with pytest.raises(UnreachableError):
            await keeper.save(state(2))
        kv.fail_after = None
        assert await EtcdState(kv, PREFIX, term).load() == state(1)
    after_a_crash = EtcdState(kv, PREFIX, term, part_bytes=200)
    await after_a_crash.load()
    await after_a_crash.save(state(3))
    assert len(await kv.list_keys(f"{PREFIX}/state/")) == num_parts
    assert await after_a_crash.load() == state(3)


async def test_a_deposed_leader_writes_nothing_and_knows_that_it_is_over() -> None:
    kv = MemoryKv()
    old_term = await elect(kv)
    old = EtcdState(kv, PREFIX, old_term, part_bytes=200)
    await old.save(state(1))
    await kv.time.advance(3)
    new = EtcdState(kv, PREFIX, await elect(kv, "b"))
    await new.save(state(2))
    before = dict(kv.entries)
    with pytest.raises(DeposedError, match="another balancer leads"):
        await old.save(state(3))
    assert kv.entries == before
    assert not old_term.holds()


@pytest.mark.parametrize("damage", ["head", "part", "missing"])
async def test_a_damaged_state_is_an_error_with_a_remedy(damage: str) -> None:
    kv = MemoryKv()
    keeper = EtcdState(kv, PREFIX, await elect(kv))
    await keeper.save(state(1))
    part = (await kv.list_keys(f"{PREFIX}/state/"))[0]
    if damage == "missing":
        del kv.entries[part]
    else:
        key = part if damage == "part" else f"{PREFIX}/state"
        kv.entries[key] = Entry(value=b"[]", create_revision=1, mod_revision=1, lease=0)
    with pytest.raises(UserError, match=r"balancer\.etcd\.prefix: .*damaged.*delete these keys"):
        await keeper.load()


class Sent:
    """``Outgoing`` that remembers."""

    def __init__(self) -> None:
        self.sessions: list[int] = []

    def send(self, session: int, message: mesh_pb2.JoinResponse) -> None:
        self.sessions.append(session)

    def close(self, session: int) -> None:
        self.sessions.append(-session)


async def test_what_follows_from_a_state_is_said_when_it_is_saved_in_order_and_not_by_a_deposed_leader() -> None:
    kv = MemoryKv()
    term = await elect(kv)
    saver = StateSaver(EtcdState(kv, PREFIX, term), EventLog(lambda: 0.0))
    sent, message = Sent(), mesh_pb2.JoinResponse()
    outgoing = SavedFirst(sent, saver, term.holds)
    outgoing.send(1, message)
    assert sent.sessions == [1], "it follows from nothing that is not saved"
    saver.ask(state(1))
    outgoing.send(2, message)
    outgoing.close(2)
    outgoing.send(5, mesh_pb2.JoinResponse(welcome=mesh_pb2.Welcome()))
    kv.down = True
    assert not await saver.flush()
    assert sent.sessions == [1, 5], "who comes is welcome"
    kv.down = False
    assert await saver.flush()
    outgoing.send(3, message)
    assert sent.sessions == [1, 5, 2, -2, 3]
    saver.ask(state(2))
    outgoing.send(4, message)
    await kv.time.advance(3)
    assert not await saver.flush(), "its lease is over, and with it the key that the write compares"
    saver.num_saved = saver.num_asked
    saver.on_saved()
    assert sent.sessions == [1, 5, 2, -2, 3]


async def test_a_state_that_is_asked_for_while_another_is_written_is_not_taken_for_saved() -> None:
    kv = MemoryKv()
    term = await elect(kv)

    class Slow(EtcdState):
        async def save(self, newest: DurableState) -> None:
            if newest == state(1):  # a view was published meanwhile
                saver.ask(state(2))
            await super().save(newest)

    keeper = Slow(kv, PREFIX, term)
    saver = StateSaver(keeper, EventLog(lambda: 0.0))
    saver.ask(state(1))
    assert await saver.flush()
    assert (saver.num_asked, saver.num_saved) == (2, 1)
    assert await saver.flush()
    assert saver.num_saved == 2
    assert await keeper.load() == state(2)
