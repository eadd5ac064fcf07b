"""Many streams at once through one router: none lost, none mixed up, and nothing of a cancelled one stays."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import generate_pb2
from support import reference
from support.attention import one_torch_thread
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S, demo_prompts, generate_all

pytestmark = pytest.mark.slow

FILTERS: list[dict[str, Any]] = [{}, {"top_p": 0.8}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.2}]
NUM_STREAMS = 500
NUM_TOKENS = 32
REFERENCE_CONCURRENCY = 48
NUM_CANCELLED = 200
NUM_SURVIVORS = 8


def distinct_prompts(count: int) -> list[tuple[int, ...]]:
    """Pieces of the demo prompts, 3 to 47 tokens long, no two equal."""
    path = demo_model_path()
    tokens = [token for prompt in demo_prompts() for token in reference.encode(path, prompt.text)]
    ring = itertools.cycle(tokens)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        length = 3 + 7 * len(prompts) % 45
        prompts[tuple(itertools.islice(ring, length))] = None
    return list(prompts)


def is_greedy(index: int) -> bool:
    return index % 2 == 0


def stream_request(index: int, prompt: Sequence[int]) -> generate_pb2.GenerateRequest:
    """Greedy and seeded requests in turn; the filters of the seeded ones differ."""
    if is_greedy(index):
        return build_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.0)
    filters = FILTERS[index // 2 % len(FILTERS)]
    return build_request(
        prompt, max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, seed=1_000_003 * index, **filters
    )


async def test_500_streams_each_as_if_it_were_alone(live: LiveMesh) -> None:
    prompts = distinct_prompts(NUM_STREAMS)
    requests = [stream_request(index, prompt) for index, prompt in enumerate(prompts)]
    started_s = time.monotonic()
    outputs = await generate_all(live.router, requests, concurrency=NUM_STREAMS)
    seconds = time.monotonic() - started_s
    rate = NUM_STREAMS * NUM_TOKENS / seconds
    print(f"\n{NUM_STREAMS} streams x {NUM_TOKENS} tokens in {seconds:.1f} s: {rate:.0f} tokens/s")

    references = await reference_outputs(live, prompts, requests)
    for index, (output, token_ids) in enumerate(zip(outputs, references, strict=True)):
        assert tuple(output.token_ids) == token_ids, f"stream {index}, {'greedy' if is_greedy(index) else 'sampled'}"
        assert output.text == reference.decode(demo_model_path(), token_ids)
        assert len(output.token_ids) == NUM_TOKENS
        assert output.finish.reason == generate_pb2.FINISH_REASON_LENGTH
        assert output.finish.prompt_tokens == len(prompts[index])
    assert len(set(references)) > 0.9 * NUM_STREAMS, "streams so alike would not show that they are mixed up"
    await live.until_idle()


async def reference_outputs(
    live: LiveMesh, prompts: Sequence[tuple[int, ...]], requests: Sequence[generate_pb2.GenerateRequest]
) -> list[tuple[int, ...]]:
    """transformers' tokens of greedy streams; of sampled ones what the mesh gives with fewer streams beside them."""
    indices = range(len(requests))
    greedy, sampled = list(filter(is_greedy, indices)), list(itertools.filterfalse(is_greedy, indices))
    sampled.reverse()  # so that a sequence meets other company in its batches than before
    started_s = time.monotonic()
    answers = await generate_all(live.router, [requests[i] for i in sampled], concurrency=REFERENCE_CONCURRENCY)
    sampled_s, started_s = time.monotonic() - started_s, time.monotonic()
    with one_torch_thread():
        by_transformers = reference.greedy(demo_model_path(), tuple(prompts[i] for i in greedy), NUM_TOKENS, None)
    print(
        f"references: {sampled_s:.1f} s for the sampled ones, {time.monotonic() - started_s:.1f} s for the greedy ones"
    )
    found = dict(zip(greedy, by_transformers, strict=True))
    found |= {index: tuple(answer.token_ids) for index, answer in zip(sampled, answers, strict=True)}
    return [found[index] for index in indices]


async def test_cancelled_streams_give_everything_back(live: LiveMesh) -> None:
    """Half of them are cancelled by the client's RPC, half by Abort; those that go on are not disturbed."""
    await live.until_idle()
    prompts = distinct_prompts(NUM_CANCELLED + NUM_SURVIVORS)
    requests = [
        build_request(prompt, request_id=f"cancel-{index}", max_tokens=400, ignore_eos=True, temperature=0.0)
        for index, prompt in enumerate(prompts[:NUM_CANCELLED])
    ]
    surviving = [stream_request(index, prompt) for index, prompt in enumerate(prompts[NUM_CANCELLED:])]
    async with GenerateClient(live.router) as client:
        expected = await asyncio.gather(*(client.complete(r, timeout_s=REQUEST_TIMEOUT_S) for r in surviving))
        streams = [aiter(client.stream(request, timeout_s=REQUEST_TIMEOUT_S)) for request in requests]
        first = await asyncio.gather(*(anext(stream) for stream in streams))
        assert all(message.token_ids and not message.HasField("finish") for message in first)
        survivors = [asyncio.ensure_future(client.complete(r, timeout_s=REQUEST_TIMEOUT_S)) for r in surviving]
        busy = [live.metrics(server_id) for server_id in live.attention_servers]
        print("\nin mid-stream:", [(v["vllm:num_requests_running"], v["vllm:kv_cache_usage_perc"]) for v in busy])
        assert all(values["vllm:kv_cache_usage_perc"] > 0 for values in busy)

        started_s = time.monotonic()
        by_rpc, by_abort = streams[: NUM_CANCELLED // 2], streams[NUM_CANCELLED // 2 :]
        await asyncio.gather(*(stream.aclose() for stream in by_rpc))  # type: ignore[attr-defined]  # an asynchronous generator
        found = await asyncio.gather(*(client.abort(f"cancel-{NUM_CANCELLED // 2 + i}") for i in range(len(by_abort))))
        assert all(found)
        for ending in await asyncio.gather(*(last_message(stream) for stream in by_abort)):
            assert ending.finish.reason == generate_pb2.FINISH_REASON_CANCELLED
        answers = await asyncio.gather(*survivors)
        assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in expected]
        await live.until_idle()
        print(f"all of it is back {time.monotonic() - started_s:.2f} s after the cancelling began")


async def last_message(stream: AsyncIterator[generate_pb2.GenerateResponse]) -> generate_pb2.GenerateResponse:
    return [message async for message in stream][-1]
