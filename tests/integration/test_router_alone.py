"""A router over real sockets, with scripted attention servers and a scripted balancer."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from expertmesh.mesh import rpc
from expertmesh.mesh.client import Completion
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from support.fake_attention import FakeAttention, expected_tokens, scripted
from support.refusals import refusal
from support.router_stand import PROMPT, TIMEOUT_S, Stand, ask, stand

__all__ = ["stand"]


async def test_generates_streamed_and_unary(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    streamed = await client.complete(ask(request_id="mine", logprobs=2))
    unary = await client.generate(ask(logprobs=2))
    assert streamed.token_ids == unary.token_ids == expected_tokens(PROMPT, 1, 8)
    assert streamed.text == unary.text != ""
    assert len(streamed.logprobs) == len(unary.logprobs) == 8
    assert (streamed.request_id, streamed.finish_reason) == ("mine", "length")
    assert (streamed.finish.prompt_tokens, streamed.finish.completion_tokens) == (4, 8)
    assert 0 < streamed.finish.ttft_ms <= streamed.finish.e2e_ms
    assert server.hellos[0].router_id == "router-0"
    submit = server.submits[0]
    assert list(submit.eos_token_ids) == [0]
    assert submit.sampling_params.temperature == pytest.approx(0.7)
    info = await client.model_info()
    assert (info.model, info.has_chat_template) == ("expertmesh-demo", False)


async def test_a_server_that_knows_no_columns_is_understood(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0", makes_columns=False)])
    assert (await client.complete(ask())).token_ids == expected_tokens(PROMPT, 1, 8)


async def test_text_prompt_and_hidden_end_of_sequence(stand: Stand) -> None:
    server = FakeAttention("a0", script=scripted([300, 301, 0]))
    client = await stand.start([server])
    answer = await client.complete(ask(prompt="Once upon a time", max_tokens=20))
    assert (answer.token_ids, answer.finish_reason) == ([300, 301, 0], "stop")
    assert answer.finish.matched_token_id == 0
    assert "endoftext" not in answer.text


async def test_stop_string_ends_the_sequence_on_the_attention_server(stand: Stand) -> None:
    client = await stand.start([])
    ids = await _tokenizer_ids("one two three four")
    server = await FakeAttention("a0", script=scripted(ids)).start()
    stand.servers.append(server)
    stand.balancer.publish([server])
    answer = await client.complete(ask(max_tokens=500, stop=["o th"]))
    assert (answer.text, answer.finish_reason, answer.finish.matched_stop_str) == ("one tw", "stop", "o th")
    assert answer.token_ids == ids[: len(answer.token_ids)]
    await server.until(lambda: server.num_running == 0)
    assert server.aborts == [1]


async def _tokenizer_ids(text: str) -> list[int]:
    from tokenizers import Tokenizer

    from expertmesh.mesh.model.demo import demo_model_path

    ids: list[int] = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")).encode(text).ids
    return ids


BAD = [
    (ask(prompt=""), "INVALID_ARGUMENT", "text: the prompt is empty"),
    (ask(prompt=[]), "INVALID_ARGUMENT", "tokenized.input_ids: the prompt is empty"),
    (generate_pb2.GenerateRequest(), "INVALID_ARGUMENT", "input: there is no prompt"),
    (ask(prompt="word " * 3000), "INVALID_ARGUMENT", "max_model_len is 1024"),
    (ask(prompt=[1] * 1024), "INVALID_ARGUMENT", "max_model_len is 1024"),
    (ask(prompt=[1, 8192]), "INVALID_ARGUMENT", "token id 8192 at position 1"),
    (ask(prompt="x" * (4 * 2**20 + 1)), "INVALID_ARGUMENT", "router.max_prompt_bytes"),
    (ask(prompt="x" * (50 * 2**20)), "INVALID_ARGUMENT", "router.max_prompt_bytes"),
    (ask(prompt="x" * (65 * 2**20)), "RESOURCE_EXHAUSTED", "larger than max"),
    (ask(temperature=-1), "INVALID_ARGUMENT", "sampling_params.temperature"),
    (ask(temperature=float("nan")), "INVALID_ARGUMENT", "sampling_params.temperature"),
    (ask(top_p=0), "INVALID_ARGUMENT", "sampling_params.top_p"),
    (ask(max_tokens=0), "INVALID_ARGUMENT", "sampling_params.max_tokens"),
    (ask(stop=["x"] * 100), "INVALID_ARGUMENT", "sampling_params.stop"),
    (ask(model="gpt-5"), "NOT_FOUND", "'expertmesh-demo'"),
    (
        generate_pb2.GenerateRequest(chat=generate_pb2.ChatInput(messages=[{"role": "user", "content": "hi"}])),  # type: ignore[list-item]  # protobuf takes dicts
        "FAILED_PRECONDITION",
        "chat_template.jinja",
    ),
]


async def test_bad_input_is_refused_and_good_input_still_served(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0")])
    for request, code, message in BAD:
        for call in (client.complete(request), client.generate(request)):
            refused = await refusal(call)
            assert (refused.code().name, message in (refused.details() or "")) == (code, True), refused.details()
    assert len((await client.complete(ask())).token_ids) == 8


async def test_bytes_that_are_no_utf8_are_refused(stand: Stand) -> None:
    await stand.start([FakeAttention("a0")])
    async with rpc.open_channel(stand.address, TlsConfig()) as channel:
        raw: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/expertmesh.v1.GenerationService/GenerateUnary"
        )
        for data in (b"\x1a\x02\xff\xfe", b"\x1a\xff", b"\xff" * 9):
            refused = await refusal(raw(data))
            assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "UTF-8" in (refused.details() or "")


async def test_cancelled_rpc_is_aborted_on_the_attention_server(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    server.going.clear()
    running = [asyncio.create_task(client.complete(ask(seed=seed))) for seed in range(20)]
    await server.until(lambda: server.num_running == 20)
    server.step()
    for task in running[::2]:
        task.cancel()
    await server.until(lambda: server.num_running == 10)
    server.going.set()
    answers = await asyncio.gather(*running[1::2])
    assert [answer.token_ids for answer in answers] == [expected_tokens(PROMPT, seed, 8) for seed in range(1, 20, 2)]


async def test_abort_ends_with_what_there_is(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    server.going.clear()
    stream = client.stream(ask(request_id="r"))
    reading = asyncio.ensure_future(anext(stream))
    await server.until(lambda: server.num_running == 1)
    refused = await refusal(client.generate(ask(request_id="r")))
    assert refused.code() is grpc.StatusCode.ALREADY_EXISTS
    server.step()
    first = await reading
    assert await client.abort("r")
    last = [response async for response in stream][-1]
    assert last.finish.reason == generate_pb2.FINISH_REASON_CANCELLED
    assert list(first.token_ids) == expected_tokens(PROMPT, 1, 1)
    await server.until(lambda: server.num_running == 0)
    assert not await client.abort("r")


async def test_limits_carry_a_retry_hint(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server], max_queued_requests=2, max_requests_per_tenant=1)
    server.going.clear()
    first = asyncio.create_task(client.complete(ask(tenant="alice")))
    await server.until(lambda: server.num_running == 1)
    refused = await refusal(client.complete(ask(tenant="alice")))
    assert (refused.code(), "alice" in (refused.details() or "")) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    metadata = refused.trailing_metadata()
    assert metadata is not None
    assert int(dict(metadata)["retry-after-ms"]) > 0
    second = asyncio.create_task(client.complete(ask(tenant="bob")))
    await server.until(lambda: server.num_running == 2)
    refused = await refusal(client.complete(ask(tenant="carol")))
    assert "max_queued_requests" in (refused.details() or "")
    server.going.set()
    await asyncio.gather(first, second)


async def test_without_a_mesh_requests_wait_and_then_learn_the_reason(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await stand.start([], no_capacity_timeout_s=0.2)
    refused = await refusal(client.complete(ask()))
    assert (refused.code(), "in a view" in (refused.details() or "")) == (grpc.StatusCode.UNAVAILABLE, True)
    stand.balancer.pause("3 experts have no home")
    async with asyncio.timeout(TIMEOUT_S):
        while "3 experts have no home" not in ((await refusal(client.complete(ask()))).details() or ""):
            pass
    monkeypatch.setattr("expertmesh.router.patience._DEADLINE_MARGIN_S", 9.0)
    refused = await refusal(client.complete(ask(), timeout_s=9.5))
    assert (refused.code(), "no home" in (refused.details() or "")) == (grpc.StatusCode.UNAVAILABLE, True)


async def test_a_waiting_request_runs_when_the_mesh_comes(stand: Stand) -> None:
    client = await stand.start([])
    waiting = asyncio.create_task(client.complete(ask()))
    server = await FakeAttention("a0").start()
    stand.servers.append(server)
    stand.balancer.publish([server])
    assert (await waiting).token_ids == expected_tokens(PROMPT, 1, 8)


async def test_health_follows_the_attention_servers(stand: Stand) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    await server.set_serving(False)
    await stand.until_serving(False)
    await server.set_serving(True)
    await stand.until_serving(True)
    server.break_links()
    await server.until(lambda: len(server.hellos) == 2)
    await stand.until_serving(True)


async def test_deadline(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    await client.complete(ask())  # from now on it is connected, and the time goes to the request alone
    server.going.clear()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.complete(ask(), timeout_s=1.0)
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < server.submits[1].timeout_s <= 1.1  # gRPC rounds deadlines up on their way
    await server.until(lambda: server.num_running == 0)


async def test_a_client_that_never_reads_is_dropped(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server], client_stall_timeout_s=0.3)
    server.going.clear()
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with rpc.open_channel(stand.address, TlsConfig(), options=options) as channel:
        call = generate_pb2_grpc.GenerationServiceStub(channel).Generate(ask(max_tokens=1000, logprobs=20))
        await server.until(lambda: server.num_running == 1)
        for _ in range(900):
            server.step()
        await server.until(lambda: server.num_running == 0)
        assert server.aborts == [1]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _read_all(call)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "client_stall_timeout_s" in (refused.value.details() or "")
    server.going.set()
    assert len((await client.complete(ask())).token_ids) == 8


async def _read_all(call: grpc.aio.UnaryStreamCall[Any, generate_pb2.GenerateResponse]) -> None:
    async for _ in call:
        pass


async def test_stop_lets_running_requests_finish_and_takes_nothing_new(stand: Stand) -> None:
    server = FakeAttention("a0")
    client = await stand.start([server])
    server.going.clear()
    running = asyncio.create_task(client.complete(ask()))
    await server.until(lambda: server.num_running == 1)
    stand.stop.set()
    await stand.until_serving(False)
    refused = await refusal(client.complete(ask()))
    assert (refused.code(), "router stops" in (refused.details() or "")) == (grpc.StatusCode.UNAVAILABLE, True)
    server.going.set()
    assert (await running).token_ids == expected_tokens(PROMPT, 1, 8)
    assert stand.task is not None
    async with asyncio.timeout(TIMEOUT_S):
        await stand.task
    assert stand.balancer.leaving == ["stopping"]


async def test_long_prompt_does_not_stall_other_streams(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0")])
    # One piece of text without a break is the tokenizer's worst case; below the bound on the bytes of a token.
    long = asyncio.create_task(refusal(client.complete(ask(prompt="a" * 15_000))))
    answers: list[Completion] = [await client.complete(ask(seed=seed)) for seed in range(5)]
    assert all(len(answer.token_ids) == 8 for answer in answers)
    assert "max_model_len" in ((await long).details() or "")


async def test_two_hundred_streams_are_not_mixed_up(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0"), FakeAttention("a1", max_steps=20)])
    answers = await asyncio.gather(
        *(client.complete(ask(max_tokens=32, seed=seed, prompt=[2 + seed, 3])) for seed in range(200))
    )
    for seed, answer in enumerate(answers):
        assert answer.token_ids == expected_tokens([2 + seed, 3], seed, 32)
