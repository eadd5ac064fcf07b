"""What a request was made of goes with it, and does not wait for the garbage collector: a router seldom has that look
at anything older than a moment, so under a thousand streams its memory would grow and grow."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc
import httpx2
import pytest

from expertmesh.mesh.client import GenerateClient
from support.fake_attention import FakeAttention
from support.mesh_state import until
from support.refusals import refusal
from support.router_stand import TIMEOUT_S, Stand, ask, stand

__all__ = ["stand"]

OF_A_REQUEST = {"Generation", "RequestTelemetry", "Refusal"}
OF_A_CALL = {*OF_A_REQUEST, "_ServicerContext", "_MessageReceiver"}
OF_AN_ANSWER = {*OF_A_REQUEST, "Generating", "_Answer"}
TIMES = 8
ASKED = {"prompt": [5, 6, 7], "max_tokens": 4}
NOTHING_FREE = (grpc.StatusCode.RESOURCE_EXHAUSTED, "attention.max_waiting")


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept(kinds: set[str]) -> Counter[str]:
    return Counter(name for thing in gc.get_objects() if (name := type(thing).__name__) in kinds)


async def leaves_nothing(kinds: set[str], once: Callable[[], Awaitable[object]]) -> None:
    await once()  # links and connections stay
    before = kept(kinds)
    for _ in range(TIMES):
        await once()

    async def nothing_more() -> bool:
        return kept(kinds) <= before

    await until(nothing_more, 20, lambda: f"{kept(kinds) - before} are kept of {TIMES} requests", poll_s=0.05)


async def answered(client: GenerateClient, server: FakeAttention) -> None:
    await client.complete(ask())


async def answered_at_once(client: GenerateClient, server: FakeAttention) -> None:
    await client.generate(ask())


async def refused_at_the_door(client: GenerateClient, server: FakeAttention) -> None:
    assert (await refusal(client.complete(ask(temperature=-1)))).code() is grpc.StatusCode.INVALID_ARGUMENT


async def refused_by_the_mesh(client: GenerateClient, server: FakeAttention) -> None:
    server.refusal = NOTHING_FREE
    assert (await refusal(client.complete(ask()))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def cancelled(client: GenerateClient, server: FakeAttention) -> None:
    server.going.clear()
    running = asyncio.create_task(client.complete(ask()))
    await server.until(lambda: server.num_running == 1)
    assert OF_A_CALL - {"Refusal"} <= kept(OF_A_CALL).keys()
    running.cancel()
    await server.until(lambda: server.num_running == 0)


@pytest.mark.parametrize("once", [answered, answered_at_once, refused_at_the_door, refused_by_the_mesh, cancelled])
async def test_a_call_leaves_nothing(
    stand: Stand, once: Callable[[GenerateClient, FakeAttention], Awaitable[None]]
) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    await leaves_nothing(OF_A_CALL, lambda: once(client, server))


class Http:
    def __init__(self, stand: Stand, server: FakeAttention, client: httpx2.AsyncClient) -> None:
        self.url = f"http://{stand.http}/v1/completions"
        self.server = server
        self.client = client

    async def asks(self, status: int = 200, **more: object) -> None:
        answer = await self.client.post(self.url, json=ASKED | more)
        assert answer.status_code == status, answer.text


async def whole(http: Http) -> None:
    await http.asks()


async def streamed(http: Http) -> None:
    await http.asks(stream=True)


async def not_understood(http: Http) -> None:
    await http.asks(400, temperature=-1)


async def not_taken(http: Http) -> None:
    http.server.refusal = NOTHING_FREE
    await http.asks(429)
    await http.asks(429, n=3)


async def left_alone(http: Http) -> None:
    http.server.going.clear()
    for choices in (1, 3):
        running = asyncio.create_task(http.asks(stream=True, n=choices))
        await http.server.until(lambda: http.server.num_running == choices)  # noqa: B023 - awaited in its own turn
        assert OF_AN_ANSWER - {"Refusal"} <= kept(OF_AN_ANSWER).keys()
        running.cancel()
        await http.server.until(lambda: http.server.num_running == 0)


@pytest.fixture
async def http(stand: Stand) -> AsyncIterator[Http]:
    server = FakeAttention("a0")
    await stand.start([server])
    async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        yield Http(stand, server, client)


@pytest.mark.parametrize("once", [whole, streamed, not_understood, not_taken, left_alone])
async def test_an_http_request_leaves_nothing(http: Http, once: Callable[[Http], Awaitable[None]]) -> None:
    await leaves_nothing(OF_AN_ANSWER, lambda: once(http))
