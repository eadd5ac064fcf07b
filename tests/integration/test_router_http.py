"""The HTTP door of a router without a mesh: what it refuses, how streams end, and slow or hostile callers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio

from expertmesh.mesh.api_keys import ApiKey, dump_key_file, new_secret
from expertmesh.mesh.telemetry import Metrics, Telemetry, disabled_telemetry
from support.fake_attention import FakeAttention, expected_tokens
from support.router_stand import TIMEOUT_S, Stand

PROMPT_IDS = [5, 6, 7]
ASKED: dict[str, Any] = {"prompt": PROMPT_IDS, "max_tokens": 4, "seed": 3, "temperature": 1, "return_token_ids": True}
LONG: dict[str, Any] = {**ASKED, "max_tokens": 900, "ignore_eos": True, "stream": True}


class HttpStand(Stand):
    def __init__(self) -> None:
        self.metrics = Metrics(role="router")
        super().__init__(Telemetry(disabled_telemetry().tracer, self.metrics))

    @property
    def url(self) -> str:
        return f"http://{self.http}"

    def answered(self, route: str, code: int) -> float:
        return self.metrics.http_requests.labels(route=route, code=str(code)).read()

    async def until_answered(self, route: str, code: int) -> None:
        """It is counted a moment after the last byte."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self.answered(route, code):  # noqa: ASYNC110  # the metric is all there is to see
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        assert self.http is not None
        host, _, port = self.http.rpartition(":")
        small = socket.socket()
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # the kernel reads little for who reads nothing
        small.setblocking(False)
        await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
        reader, writer = await asyncio.open_connection(sock=small, limit=1024)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


@pytest_asyncio.fixture
async def stand() -> AsyncIterator[HttpStand]:
    running = HttpStand()
    yield running
    await running.close()


@pytest_asyncio.fixture
async def http(stand: HttpStand) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
        yield client


@asynccontextmanager
async def begun(stand: HttpStand, http: httpx2.AsyncClient, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream whose choices have had one token each and get no more until ``going`` is set."""
    (server,) = stand.servers
    server.going.clear()

    async def first_step() -> None:
        await server.until(lambda: server.num_running == body.get("n", 1), TIMEOUT_S)
        server.step()

    stepping = asyncio.create_task(first_step())
    async with http.stream("POST", f"{stand.url}/v1/completions", json=body) as answer:
        await stepping
        lines = answer.aiter_lines()
        await anext(lines)
        yield lines


def refusal_of(answer: httpx2.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return dict(error)


def events(text: str) -> list[str]:
    return [line.removeprefix("data: ") for line in text.split("\n\n") if line]


async def test_stream_is_what_openai_sends(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    await stand.start([FakeAttention("a0")])
    headers = {"x-request-id": "mine"}
    answer = await http.post(f"{stand.url}/v1/completions", json={**ASKED, "stream": True}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    token_ids = [token for chunk in map(json.loads, chunks) for token in chunk["choices"][0]["token_ids"]]
    assert token_ids == expected_tokens(PROMPT_IDS, 3, 4)
    await stand.until_answered("/v1/completions", 200)


async def test_a_client_that_goes_away_cancels_its_generations(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    async with begun(stand, http, {**LONG, "n": 3}):
        assert server.num_running == 3
    await server.until(lambda: server.num_running == 0, TIMEOUT_S)
    await stand.until_answered("/v1/completions", 499)


async def test_a_client_that_reads_nothing_is_dropped(stand: HttpStand) -> None:
    server = FakeAttention("a0", tokens_per_step=64)
    await stand.start([server], client_stall_timeout_s=0.3)
    body = json.dumps({**LONG, "n": 20, "logprobs": 20}).encode()
    async with stand.connected() as (reader, writer):
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await stand.until_answered("/v1/completions", 200)
        assert not (await everything(reader)).endswith(b"0\r\n\r\n")
    assert server.num_running == 0


async def everything(reader: asyncio.StreamReader) -> bytes:
    """Until the other side closes the connection, in whatever way."""
    data = bytearray()
    async with asyncio.timeout(TIMEOUT_S):
        with contextlib.suppress(ConnectionResetError):
            while part := await reader.read(2**16):
                data += part
    return bytes(data)


async def test_full_router_says_when_to_come_back(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    await stand.start([FakeAttention("a0")], max_queued_requests=1)
    async with begun(stand, http, LONG):
        refused = await http.post(f"{stand.url}/v1/completions", json=ASKED)
        assert refused.status_code == 429
        assert refusal_of(refused)["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
        assert int(refused.headers["retry-after-ms"]) >= 50
        with pytest.raises(openai.RateLimitError):
            async with openai.AsyncOpenAI(base_url=f"{stand.url}/v1", api_key="none", max_retries=0) as client:
                await client.completions.create(model="expertmesh-demo", prompt="x")


async def test_a_running_request_id_is_taken(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    await stand.start([FakeAttention("a0")])
    async with begun(stand, http, {**LONG, "request_id": "r1"}):
        refused = await http.post(f"{stand.url}/v1/completions", json=ASKED, headers={"x-request-id": "r1"})
    assert refused.status_code == 409


async def test_deadline(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    server.going.clear()
    headers = {"x-request-timeout-ms": "200"}
    late = await http.post(f"{stand.url}/v1/completions", json=ASKED, headers=headers)
    assert (late.status_code, refusal_of(late)["type"]) == (504, "timeout_error")
    await server.until(lambda: server.num_running == 0, TIMEOUT_S)
    wrong = await http.post(f"{stand.url}/v1/completions", json=ASKED, headers={"x-request-timeout-ms": "soon"})
    assert (wrong.status_code, refusal_of(wrong)["param"]) == (400, "x-request-timeout-ms")


async def test_a_stream_that_fails_says_so(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    server = FakeAttention("a0")
    await stand.start([server], replay_attempts=0)
    async with begun(stand, http, LONG) as lines:
        server.break_links()
        rest = [line.removeprefix("data: ") async for line in lines if line]
    error, done = rest
    assert done == "[DONE]"
    assert json.loads(error)["error"]["type"] == "service_unavailable_error"


async def test_draining_router_ends_streams_and_takes_nothing_new(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    assert (await http.get(f"{stand.url}/health")).status_code == 200
    server.going.clear()
    running = asyncio.create_task(http.post(f"{stand.url}/v1/completions", json={**ASKED, "stream": True}))
    await server.until(lambda: server.num_running == 1, TIMEOUT_S)
    stand.stop.set()
    async with asyncio.timeout(TIMEOUT_S):
        while (health := await http.get(f"{stand.url}/health")).status_code == 200:
            pass
    assert "the router stops" in refusal_of(health)["message"]
    refused = await http.post(f"{stand.url}/v1/completions", json=ASKED)
    assert (refused.status_code, refusal_of(refused)["type"]) == (503, "service_unavailable_error")
    server.going.set()
    assert events((await running).text)[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", "body"),
        (b"[]", "body"),
        (b'{"prompt": "a"', "body"),
        (b'{"prompt": "\\ud800"}', "body"),
        (b"{}", "prompt"),
        (b'{"prompt": []}', "prompt"),
        (b'{"prompt": [true]}', "prompt[0]"),
        (b'{"prompt": [-1]}', "prompt"),
        (b'{"prompt": "a", "n": 0}', "n"),
        (b'{"prompt": "a", "n": 65}', "n"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "top_p": "1"}', "top_p"),
        (b'{"prompt": "a", "echo": true}', "echo"),
        (b'{"prompt": "a", "suffix": "b"}', "suffix"),
        (b'{"prompt": "a", "best_of": 3}', "best_of"),
        (b'{"prompt": "a", "stop": [1]}', "stop"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "seed": 9223372036854775808}', "seed"),
        (b'{"prompt": "a", "stream_options": {}}', "stream_options"),
        (b'{"prompt": "a", "response_format": {"type": "json_schema"}}', "response_format.json_schema"),
        (b'{"prompt": "a", "structured_outputs": {}}', "structured_outputs"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs"),
    ],
)
async def test_bad_bodies(stand: HttpStand, http: httpx2.AsyncClient, body: bytes, param: str) -> None:
    await stand.start([FakeAttention("a0")])
    answer = await http.post(f"{stand.url}/v1/completions", content=body)
    assert answer.status_code == 400
    error = refusal_of(answer)
    assert error["param"] == param
    assert error["message"].startswith(param)


async def test_paths_methods_and_sizes(stand: HttpStand, http: httpx2.AsyncClient) -> None:
    await stand.start([FakeAttention("a0")], http={"max_body_bytes": 1024, "max_header_bytes": 2048})
    for path, status in (("/", 404), ("/v1/completions", 405), ("/v1/models/gpt-0", 404), ("/metrics", 404)):
        answer = await http.get(f"{stand.url}{path}")
        assert answer.status_code == status
        refusal_of(answer)
    large = {"prompt": "a" * 2000}
    answer = await http.post(f"{stand.url}/v1/completions", json=large)
    assert (answer.status_code, "router.http.max_body_bytes" in refusal_of(answer)["message"]) == (413, True)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"a" * 100

    assert (await http.post(f"{stand.url}/v1/completions", content=pieces())).status_code == 413
    assert (await http.get(f"{stand.url}/health", headers={"x": "a" * 3000})).status_code == 431
    assert (await http.get(f"{stand.url}/health")).status_code == 200
    assert stand.answered("other", 404) == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{",
    ],
)
async def test_requests_that_do_not_arrive_are_cut_off(stand: HttpStand, sent: bytes) -> None:
    await stand.start([FakeAttention("a0")], http={"receive_timeout_s": 0.2})
    async with stand.connected() as (reader, writer):
        writer.write(sent)
        assert await everything(reader) == b""


async def test_endless_header_is_refused(stand: HttpStand) -> None:
    await stand.start([FakeAttention("a0")], http={"max_header_bytes": 4096})
    async with stand.connected() as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"a" * 5000)
        assert (await everything(reader)).startswith(b"HTTP/1.1 431 ")


async def test_keys(stand: HttpStand, http: httpx2.AsyncClient, tmp_path: Path) -> None:
    secrets = {}
    entries = {}
    for name, scope in (("writer", "generate"), ("watcher", "read")):
        secrets[name], digest = new_secret(name)
        entries[name] = ApiKey.model_validate(
            {"id": name, "sha256": digest, "scopes": (scope,), "created": "2026-01-01T00:00:00Z"}
        )
    keys_file = tmp_path / "keys.json"
    keys_file.write_text(dump_key_file(entries), encoding="utf-8")
    stand.sections = {"api": {"keys_file": str(keys_file)}}
    await stand.start([FakeAttention("a0")])
    for key, status in ((None, 401), ("emk.writer.x", 401), (secrets["watcher"], 403), (secrets["writer"], 200)):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = await http.post(f"{stand.url}/v1/completions", json=ASKED, headers=headers)
        assert answer.status_code == status
        if status != 200:
            assert refusal_of(answer)["type"] in ("authentication_error", "permission_error")
    assert (await http.get(f"{stand.url}/health")).status_code == 200
