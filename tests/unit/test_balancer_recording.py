"""Recordings in the balancer: one at a time, from whoever serves, to the last token or to a reason."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from expertmesh.balancer import recording
from expertmesh.balancer.actual import Actual, Phase
from expertmesh.balancer.members import Member
from expertmesh.balancer.recording import Recordings
from expertmesh.balancer.refusal import RefusedError
from expertmesh.v1 import admin_pb2, mesh_pb2
from support.balancer_parts import config
from support.balancer_world import World

LAYERS, EXPERTS, TOP_K = 2, 8, 2
TIMEOUT_S = 10.0


class Stand:
    """Recordings over a world with two attention servers; what is sent to them is kept."""

    def __init__(self) -> None:
        world = World(config(attention=2))
        for server_id in ("a1", "a2", "e1", "e2"):
            world.join(server_id)
        world.advance(1.0)
        self.actual: Actual = world.actual
        assert self.actual.phase is Phase.SERVING
        self.now = 0.0
        self.sent: list[tuple[int, mesh_pb2.RecordControl]] = []
        self.changed = asyncio.Event()
        self.recordings = Recordings(self.actual, self._send, lambda: self.now)

    def _send(self, session: int, message: mesh_pb2.JoinResponse) -> None:
        self.sent.append((session, message.record))
        self.changed.set()

    def member(self, server_id: str) -> Member:
        member = self.actual.members.get(server_id)
        assert member is not None
        return member

    async def record_id(self) -> int:
        """Of the recording that runs, once servers were told of it."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.sent:
                self.changed.clear()
                await self.changed.wait()
        return self.sent[-1][1].id

    def told(self) -> list[tuple[int, int]]:
        return [(session, control.max_tokens) for session, control in self.sent]

    @contextlib.asynccontextmanager
    async def recorded(self, max_tokens: int) -> AsyncIterator[asyncio.Task[list[admin_pb2.RecordResponse]]]:
        async def read() -> list[admin_pb2.RecordResponse]:
            request = admin_pb2.RecordRequest(max_tokens=max_tokens)
            async with contextlib.aclosing(self.recordings.record(request)) as parts:
                return [part async for part in parts]

        task = asyncio.create_task(read())
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def chunk(record_id: int, first: int, tokens: int, value: int = 1) -> mesh_pb2.TraceChunk:
    topk = np.full((LAYERS, tokens, TOP_K), value, "<i2")
    return mesh_pb2.TraceChunk(
        record_id=record_id, num_tokens=tokens, top_k=TOP_K, topk=topk.tobytes(), first_token=first
    )


async def finished(task: asyncio.Task[list[admin_pb2.RecordResponse]]) -> list[tuple[str, int]]:
    parts = await asyncio.wait_for(task, TIMEOUT_S)
    for part in parts:
        assert len(part.topk) == LAYERS * part.num_tokens * TOP_K * 2
        assert (part.num_experts, list(part.layers), part.top_k) == (EXPERTS, [0, 2], TOP_K)
    return [(part.server_id, part.num_tokens) for part in parts]


async def test_tokens_of_all_attention_servers_to_the_last_one_wanted() -> None:
    stand = Stand()
    a1, a2 = stand.member("a1"), stand.member("a2")
    async with stand.recorded(10) as task:
        record_id = await stand.record_id()
        assert stand.told() == [(a1.session, 10), (a2.session, 10)]
        stand.recordings.hear(a1, chunk(record_id, 0, 0))  # it has begun
        stand.recordings.hear(a1, chunk(record_id, 0, 4))
        stand.recordings.hear(a2, chunk(record_id, 0, 3))
        stand.recordings.hear(a1, chunk(record_id, 0, 4))  # again, on a new connection
        stand.recordings.hear(a2, chunk(record_id, 3, 8))
        assert await finished(task) == [("a1", 0), ("a1", 4), ("a2", 3), ("a2", 3)]
    assert stand.told()[2:] == [(a1.session, 0), (a2.session, 0)]
    stand.recordings.hear(a1, chunk(record_id, 4, 1))  # late: it is told once more
    assert stand.told()[4:] == [(a1.session, 0)]


async def test_one_at_a_time_and_the_next_one_after_it() -> None:
    stand = Stand()
    async with stand.recorded(10):
        await stand.record_id()
        with pytest.raises(RefusedError) as refused:
            await anext(stand.recordings.record(admin_pb2.RecordRequest(max_tokens=1)))
        assert refused.value.code is grpc.StatusCode.ALREADY_EXISTS
    stand.sent.clear()
    async with stand.recorded(1) as task:  # the administrator of the first went away
        stand.recordings.hear(stand.member("a1"), chunk(await stand.record_id(), 0, 1))
        assert await finished(task) == [("a1", 1)]


@pytest.mark.parametrize("max_tokens", [0, recording.MAX_TOKENS + 1])
async def test_a_wrong_number_of_tokens_is_refused(max_tokens: int) -> None:
    with pytest.raises(RefusedError) as refused:
        await anext(Stand().recordings.record(admin_pb2.RecordRequest(max_tokens=max_tokens)))
    assert refused.value.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_without_a_view_nothing_is_recorded() -> None:
    stand = Stand()
    stand.actual.phase = Phase.NONE
    with pytest.raises(RefusedError) as refused:
        await anext(stand.recordings.record(admin_pb2.RecordRequest(max_tokens=1)))
    assert refused.value.code is grpc.StatusCode.FAILED_PRECONDITION


async def test_servers_that_come_back_are_told_and_those_that_died_are_not_waited_for() -> None:
    stand = Stand()
    async with stand.recorded(10) as task:
        record_id = await stand.record_id()
        stand.recordings.hear(stand.member("a1"), chunk(record_id, 0, 4))
        stand.actual.members.change(stand.member("a1"), session=None)  # dies
        stand.actual.members.change(stand.member("a2"), session=77)  # comes back on another stream
        stand.changed.clear()
        async with asyncio.timeout(TIMEOUT_S):
            await stand.changed.wait()
        assert stand.told()[2:] == [(77, 6)]
        stand.recordings.hear(stand.member("a2"), chunk(record_id, 0, 6))
        assert await finished(task) == [("a1", 4), ("a2", 6)]


@pytest.mark.parametrize("tokens", [0, 3])
async def test_a_recording_ends_when_traffic_does(tokens: int) -> None:
    stand = Stand()
    async with stand.recorded(10) as task:
        record_id = await stand.record_id()
        stand.recordings.hear(stand.member("a1"), chunk(record_id, 0, tokens))
        stand.now += recording.IDLE_TIMEOUT_S + 1
        if tokens:
            assert await finished(task) == [("a1", tokens)]
        else:
            with pytest.raises(RefusedError) as refused:
                await asyncio.wait_for(task, TIMEOUT_S)
            assert refused.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_administrator_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_QUEUED_BYTES", 100)
    stand = Stand()
    parts = stand.recordings.record(admin_pb2.RecordRequest(max_tokens=1000))
    first = asyncio.ensure_future(anext(parts))
    record_id = await stand.record_id()
    stand.recordings.hear(stand.member("a1"), chunk(record_id, 0, 1))
    await asyncio.wait_for(first, TIMEOUT_S)
    stand.recordings.hear(stand.member("a1"), chunk(record_id, 1, 100))
    with pytest.raises(RefusedError) as refused:
        await anext(parts)
    assert refused.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_what_is_not_of_this_model_is_left_out() -> None:
    stand = Stand()
    async with stand.recorded(2) as task:
        record_id = await stand.record_id()
        short = chunk(record_id, 0, 2)
        short.num_tokens = 3
        for wrong in (short, chunk(record_id, 0, 2, value=EXPERTS), chunk(record_id, 0, 2, value=-2)):
            stand.recordings.hear(stand.member("a1"), wrong)
        stand.recordings.hear(stand.member("a1"), chunk(record_id, 0, 2, value=-1))
        assert await finished(task) == [("a1", 2)]
