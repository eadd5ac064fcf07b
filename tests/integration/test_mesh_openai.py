"""The official ``openai`` client against a whole mesh: its answers are those of the gRPC API, token for token."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from expertmesh.mesh.client import Completion, GenerateClient, build_request
from expertmesh.mesh.model.demo import demo_model_path
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S

pytestmark = pytest.mark.slow

MODEL = "expertmesh-demo"
PROMPT, NUM_TOKENS, SEED = "Am nächsten Morgen", 16, 7
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": SEED, "max_tokens": NUM_TOKENS}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "<now>", "parameters": {}}}
TOKEN_IDS = {"return_token_ids": True}


@pytest_asyncio.fixture
async def client(live: LiveMesh) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{live.http}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S
    ) as client:
        yield client


async def own_answer(live: LiveMesh, prompt: str = PROMPT, **sampling: Any) -> Completion:
    async with GenerateClient(live.router) as client:
        return await client.complete(build_request(prompt, **sampling), timeout_s=REQUEST_TIMEOUT_S)


async def test_completion(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    expected = await own_answer(live, **SAMPLED)
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, extra_body=TOKEN_IDS, **SAMPLED)
    (choice,) = answer.choices
    assert choice.text == expected.text
    assert choice.model_extra is not None
    assert choice.model_extra["token_ids"] == expected.token_ids
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.finish.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)


def test_blocking_client(live: LiveMesh) -> None:
    with openai.OpenAI(base_url=f"{live.http}/v1", api_key="none", timeout=REQUEST_TIMEOUT_S) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        whole = client.completions.create(model=MODEL, prompt=PROMPT, **SAMPLED)
        stream = client.completions.create(model=MODEL, prompt=PROMPT, stream=True, **SAMPLED)
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


async def test_completion_stream(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    expected = await own_answer(live, **SAMPLED)
    stream = await client.completions.create(
        model=MODEL, prompt=PROMPT, stream=True, stream_options={"include_usage": True}, extra_body=TOKEN_IDS, **SAMPLED
    )
    chunks = [chunk async for chunk in stream]
    *pieces, last = chunks
    assert len(pieces) > 1, "a stream comes in pieces"
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected.text
    assert [
        token for chunk in pieces for token in (chunk.choices[0].model_extra or {})["token_ids"]
    ] == expected.token_ids
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + [expected.finish_reason]
    assert not last.choices
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_several_prompts_and_choices(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    """Choice i of a seeded request is what the seed + i gives."""
    prompts = [PROMPT, "def moving_average("]
    seeds = (SEED, SEED + 1)
    expected = [
        (await own_answer(live, prompt, **(SAMPLED | {"seed": seed}))).text for prompt in prompts for seed in seeds
    ]
    answer = await client.completions.create(model=MODEL, prompt=prompts, n=2, **SAMPLED)
    assert [choice.text for choice in answer.choices] == expected
    stream = await client.completions.create(model=MODEL, prompt=prompts, n=2, stream=True, **SAMPLED)
    texts = [""] * 4
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


async def test_token_ids_as_prompt_and_stop(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    ids = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")).encode(PROMPT).ids
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
    whole = (await client.completions.create(model=MODEL, prompt=ids, **greedy)).choices[0].text
    assert whole == (await own_answer(live, **greedy)).text
    stop = whole.split()[2]
    (choice,) = (await client.completions.create(model=MODEL, prompt=PROMPT, stop=[stop], **greedy)).choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert (choice.model_extra or {})["stop_reason"] == stop


@pytest.mark.parametrize(("skip", "shown"), [(True, ""), (None, ""), (False, "<|pad|>")])
async def test_special_tokens_in_text(
    live: LiveMesh, client: openai.AsyncOpenAI, skip: bool | None, shown: str
) -> None:
    """One that ends nothing, made the only likely one."""
    pad = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")).token_to_id("<|pad|>")
    asked: dict[str, Any] = {"max_tokens": 3, "temperature": 0.0}
    choices: dict[str, Any] = {} if skip is None else {"skip_special_tokens": skip}
    answer = await client.completions.create(
        model=MODEL, prompt=PROMPT, logit_bias={str(pad): 100}, extra_body=TOKEN_IDS | choices, **asked
    )
    (choice,) = answer.choices
    assert (choice.model_extra or {})["token_ids"] == [pad] * 3
    assert choice.text == shown * 3
    assert (await own_answer(live, logit_bias={pad: 100.0}, **choices, **asked)).text == shown * 3


async def test_logprobs(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    expected = await own_answer(live, logprobs=2, **SAMPLED)
    answer = await client.completions.create(model=MODEL, prompt=PROMPT, logprobs=2, **SAMPLED)
    shown = answer.choices[0].logprobs
    assert shown is not None
    assert shown.token_logprobs == pytest.approx([entry.logprob for entry in expected.logprobs])
    assert shown.top_logprobs is not None
    assert all(len(top) == 2 for top in shown.top_logprobs)
    assert shown.tokens is not None
    assert "".join(shown.tokens) == expected.text
    assert shown.text_offset == [len("".join(shown.tokens[:index])) for index in range(len(shown.tokens))]


def rendered(*, mood: str = "") -> str:
    """What the template of the tests makes of ``CONVERSATION`` without tools."""
    lines = ["system: Be brief.", "user: Weather?", "assistant:  weather(Ulm)", "tool: rain", "user: And now?"]
    return "\n".join([*lines, f"assistant{mood}:"])


CONVERSATION: list[Any] = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "call-1", "content": "rain"},
    {"role": "user", "content": "And now?"},
]


async def test_chat_goes_through_the_template(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    for text, more in (
        (rendered(), {}),
        (rendered(mood=" (glad)"), {"extra_body": {"chat_template_kwargs": {"mood": "glad"}}}),
        (rendered(), {"tools": [WEATHER], "tool_choice": "none"}),
        (
            'Tools: {"type": "function", "function": {"name": "weather", "description": "<now>", "parameters": {}}}\n'
            + rendered(),
            {"tools": [WEATHER]},
        ),
    ):
        expected = await own_answer(live, text, **SAMPLED)
        answer = await client.chat.completions.create(model=MODEL, messages=CONVERSATION, **SAMPLED, **more)
        assert answer.choices[0].message.content == expected.text
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.prompt_tokens == expected.finish.prompt_tokens


async def test_chat_stream_with_logprobs(live: LiveMesh, client: openai.AsyncOpenAI) -> None:
    sampling = {**SAMPLED, "max_completion_tokens": NUM_TOKENS}
    del sampling["max_tokens"]
    stream = await client.chat.completions.create(
        model=MODEL, messages=CONVERSATION, stream=True, logprobs=True, top_logprobs=3, **sampling
    )
    chunks = [chunk async for chunk in stream]
    expected = await own_answer(live, rendered(), logprobs=3, **SAMPLED)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    entries = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected.logprobs])
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == expected.text
    assert all(len(entry.top_logprobs) == 3 for entry in entries)
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("changes", "error", "param"),
    [
        ({"model": "gpt-0"}, openai.NotFoundError, "model"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_completion_tokens": 0}, openai.BadRequestError, "max_completion_tokens"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"tool_choice": "required", "tools": [WEATHER]}, openai.BadRequestError, "tool_choice"),
        ({"extra_body": {"colour": "blue"}}, openai.BadRequestError, "colour"),
        ({"messages": [{"role": "owl", "content": "hu"}]}, openai.BadRequestError, "messages"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "messages[0].content[0]",
        ),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, openai.BadRequestError, "chat_template_kwargs"),
    ],
)
async def test_errors_name_the_parameter(
    client: openai.AsyncOpenAI, changes: dict[str, Any], error: type[openai.APIStatusError], param: str
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    with pytest.raises(error) as refused:
        await client.chat.completions.create(**(asked | changes))
    assert refused.value.param == param
    assert str(param) in refused.value.message


async def test_response_format(client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"sky": {"enum": ["blue", "grey"]}}, "required": ["sky"]}
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "The sky?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "sky", "schema": {**schema, "additionalProperties": False}},
        },
        max_tokens=40,
        seed=SEED,
    )
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.replace(" ", "").replace("\n", "") in ('{"sky":"blue"}', '{"sky":"grey"}')
