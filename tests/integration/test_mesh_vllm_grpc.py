"""``vllm.grpc.engine.VllmEngine`` as its gateways call it, with the client code of the package smg-grpc-proto."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from expertmesh.mesh.client import Completion, GenerateClient, build_request
from expertmesh.mesh.model.demo import demo_model_path
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S

pytestmark = pytest.mark.slow

PROMPT_IDS = [40, 41, 42, 43]
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12, "seed": 5, "logprobs": 1}


@pytest_asyncio.fixture
async def stub(live: LiveMesh) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(live.router) as channel:
        yield vllm_engine_pb2_grpc.VllmEngineStub(channel)


def asked(*, stream: bool = False, request_id: str = "", **sampling: Any) -> Any:
    return vllm_engine_pb2.GenerateRequest(
        request_id=request_id,
        tokenized=vllm_engine_pb2.TokenizedInput(input_ids=PROMPT_IDS),
        sampling_params=vllm_engine_pb2.SamplingParams(**(SAMPLING | sampling)),
        stream=stream,
    )


async def own_answer(live: LiveMesh, **sampling: Any) -> Completion:
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    async with GenerateClient(live.router) as client:
        request = build_request(PROMPT_IDS, **(neutral | SAMPLING | sampling))
        return await client.complete(request, timeout_s=REQUEST_TIMEOUT_S)


async def messages_of(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_stream(live: LiveMesh, stub: Any) -> None:
    expected = await own_answer(live)
    *chunks, last = await messages_of(stub.Generate(asked(stream=True), timeout=REQUEST_TIMEOUT_S))
    assert len(chunks) > 1, "a stream comes in pieces"
    assert [token for message in chunks for token in message.chunk.token_ids] == expected.token_ids
    assert [message.chunk.completion_tokens for message in chunks][-1] == len(expected.token_ids)
    logprobs = [value for message in chunks for value in message.chunk.output_logprobs.token_logprobs]
    assert logprobs == pytest.approx([entry.logprob for entry in expected.logprobs])
    complete = last.complete
    assert list(complete.output_ids) == expected.token_ids
    assert (complete.finish_reason, complete.prompt_tokens) == (expected.finish_reason, len(PROMPT_IDS))


async def test_whole_with_choices(live: LiveMesh, stub: Any) -> None:
    messages = await messages_of(stub.Generate(asked(n=2), timeout=REQUEST_TIMEOUT_S))
    by_index = {message.complete.index: list(message.complete.output_ids) for message in messages}
    expected = [await own_answer(live, seed=SAMPLING["seed"] + index) for index in range(2)]
    assert by_index == {index: answer.token_ids for index, answer in enumerate(expected)}


async def test_choices_that_speak_at_the_same_time(live: LiveMesh, stub: Any) -> None:
    """They share one call, and in a step all of them have something to say."""
    answers = await asyncio.gather(
        *(messages_of(stub.Generate(asked(n=6, stream=True), timeout=REQUEST_TIMEOUT_S)) for _ in range(4))
    )
    for messages in answers:
        assert sorted(message.complete.index for message in messages if message.HasField("complete")) == [*range(6)]


async def test_abort(live: LiveMesh, stub: Any) -> None:
    call = stub.Generate(
        asked(stream=True, request_id="gone", max_tokens=900, ignore_eos=True), timeout=REQUEST_TIMEOUT_S
    )
    messages = aiter(call)
    assert (await anext(messages)).chunk.token_ids
    await stub.Abort(vllm_engine_pb2.AbortRequest(request_ids=["gone", "nobody"]), timeout=REQUEST_TIMEOUT_S)
    last = [message async for message in messages][-1]
    assert last.complete.finish_reason == "abort"
    assert last.complete.completion_tokens < 900
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        await live.until_idle()


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (asked(prompt_logprobs=1), "sampling_params.prompt_logprobs"),
        (asked(structural_tag="x"), "sampling_params.structural_tag"),
        (asked(n=1000), "sampling_params.n"),
        (asked(top_p=3), "sampling_params.top_p"),
        (vllm_engine_pb2.GenerateRequest(data_parallel_rank=1), "data_parallel_rank"),
        (vllm_engine_pb2.GenerateRequest(), "there is no prompt"),
    ],
)
async def test_bad_requests(stub: Any, request_: Any, problem: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await messages_of(stub.Generate(request_, timeout=REQUEST_TIMEOUT_S))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in (refused.value.details() or "")


async def test_what_a_gateway_asks_before_it_sends_requests(stub: Any) -> None:
    health = await stub.HealthCheck(vllm_engine_pb2.HealthCheckRequest(), timeout=REQUEST_TIMEOUT_S)
    assert (health.healthy, health.message) == (True, "")
    info = await stub.GetModelInfo(vllm_engine_pb2.GetModelInfoRequest(), timeout=REQUEST_TIMEOUT_S)
    config = json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))
    assert (info.served_model_name, info.model_type) == ("expertmesh-demo", config["model_type"])
    assert list(info.architectures) == config["architectures"]
    assert info.vocab_size == config["vocab_size"]
    assert json.loads(info.default_sampling_params_json)["temperature"] == pytest.approx(0.7)
    server = await stub.GetServerInfo(vllm_engine_pb2.GetServerInfoRequest(), timeout=REQUEST_TIMEOUT_S)
    assert not server.is_paused
    assert server.uptime_seconds > 0
    loads = await stub.GetLoads(vllm_engine_pb2.GetLoadsRequest(), timeout=REQUEST_TIMEOUT_S)
    assert len(loads.loads) == loads.dp_rank_count == 1
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.Embed(vllm_engine_pb2.EmbedRequest(), timeout=REQUEST_TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_tokenizer(stub: Any) -> None:
    chunks = await messages_of(stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=REQUEST_TIMEOUT_S))
    data = b"".join(chunk.data for chunk in chunks)
    assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.read("tokenizer.json") == (demo_model_path() / "tokenizer.json").read_bytes()
