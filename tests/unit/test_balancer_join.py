"""The end of a server's stream, whichever way it comes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from expertmesh.balancer.membership_service import MembershipServicer, Sessions
from expertmesh.balancer.routing import RoutingDesk
from expertmesh.balancer.statistics import Statistics
from expertmesh.v1 import mesh_pb2
from support.balancer_parts import config, registration
from support.balancer_world import World

TIMEOUT_S = 10.0


class Requests:
    """What a server sends: its registration, then nothing. ``reading``: somebody waits for more; the end of that wait
    takes until ``may_end``, even for one that is cancelled."""

    def __init__(self) -> None:
        self.reading, self.may_end = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[mesh_pb2.JoinRequest]:
        yield mesh_pb2.JoinRequest(registration=registration("e1"))
        self.reading.set()
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()


@pytest.mark.parametrize("ended_by", ["the client", "the balancer, and the client goes away meanwhile"])
async def test_a_stream_that_ends_is_known_to_be_closed_at_once(ended_by: str) -> None:
    world, sessions, requests, woken = World(config()), Sessions(), Requests(), asyncio.Event()
    routing = RoutingDesk(world.actual, Statistics(1), world.effects.send, lambda: world.now)
    servicer = MembershipServicer(world.actual, sessions, routing, woken.set, woken.set, lambda: world.now)
    context: Any = None  # of gRPC's, used only to refuse
    responses: Any = servicer.Join(aiter(requests), context)

    async def read() -> None:
        async with contextlib.aclosing(responses):
            async for _ in responses:
                pass

    call = asyncio.create_task(read())
    async with asyncio.timeout(TIMEOUT_S):
        await requests.reading.wait()
    member = world.actual.members.get("e1")
    assert member is not None
    assert member.session is not None
    woken.clear()
    if ended_by != "the client":
        sessions.close(member.session)
        for _ in range(5):  # turns of the event loop: the call ends, and waits for its reader
            await asyncio.sleep(0)
    call.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    requests.may_end.set()
    async with asyncio.timeout(TIMEOUT_S):
        await asyncio.wait({call})
    member = world.actual.members.get("e1")
    assert member is not None
    assert member.session is None
    assert woken.is_set()
