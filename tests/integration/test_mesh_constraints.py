"""Outputs that have to be something, on a real mesh: valid, ended where they must, and others stay as they are."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from expertmesh.mesh.client import Completion, GenerateClient, build_request
from expertmesh.v1 import generate_pb2
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S, demo_prompts, logs
from support.mesh_state import until

pytestmark = pytest.mark.slow

PROMPTS = [prompt.text for prompt in demo_prompts()[:4]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["cats", "dogs", "birds"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
REGEX = r"(Tom|Lily) is \d{1,2} years old\."
GRAMMAR = 'start: NAME (" and " NAME){0,3} "."\nNAME: /[A-Z][a-z]{2,6}/\n'
CHOICES = ["yes", "no", "yes and no"]


def check_schema(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "likes"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 120
    assert 1 <= len(person["likes"]) <= 3
    assert set(person["likes"]) <= {"cats", "dogs", "birds"}


def check_kind(kind: str, text: str) -> None:
    match kind:
        case "json_schema":
            check_schema(text)
        case "regex":
            assert re.fullmatch(REGEX, text), text
        case "grammar":
            assert re.fullmatch(r"[A-Z][a-z]{2,6}( and [A-Z][a-z]{2,6}){0,3}\.", text), text
        case "choice":
            assert text in CHOICES


KINDS: dict[str, Any] = {
    "json_schema": json.dumps(SCHEMA),
    "regex": REGEX,
    "grammar": GRAMMAR,
    "choice": {"choices": CHOICES},
}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.3, "seed": 11},
    {"temperature": 0.9, "seed": 5, "top_p": 0.8, "repetition_penalty": 1.2, "logprobs": 2, "ignore_eos": True},
]


def requests() -> list[tuple[str, generate_pb2.GenerateRequest]]:
    """Every kind of constraint under every way to sample, and as many requests without one in between."""
    made = []
    for number, (kind, value) in enumerate(KINDS.items()):
        for sampling in SAMPLING:
            prompt = PROMPTS[number % len(PROMPTS)]
            made.append((kind, build_request(prompt, max_tokens=200, **{kind: value}, **sampling)))
            made.append(("", build_request(prompt, max_tokens=24, **sampling)))
    return made


async def test_many_constraints_in_one_batch_and_none(live: LiveMesh) -> None:
    made = requests()
    async with GenerateClient(live.router) as client:
        plain = [request for kind, request in made if not kind]
        alone = await asyncio.gather(*(client.complete(r, timeout_s=REQUEST_TIMEOUT_S) for r in plain))
        together = await asyncio.gather(*(client.complete(r, timeout_s=REQUEST_TIMEOUT_S) for _, r in made))
    references = iter(alone)
    for (kind, request), answer in zip(made, together, strict=True):
        if not kind:
            assert answer.token_ids == next(references).token_ids, "a constraint of others is none of its business"
            continue
        assert answer.finish_reason == "stop", answer
        check_kind(kind, answer.text)
        if request.sampling_params.HasField("logprobs"):
            assert len(answer.logprobs) == len(answer.token_ids)
    await live.until_idle()


async def test_whatever_ends_them(live: LiveMesh) -> None:
    """Stop strings and lengths cut a constrained output short as they cut others; a cancelled one leaves nothing."""
    async with GenerateClient(live.router) as client:
        cut = await client.complete(
            build_request(PROMPTS[0], max_tokens=400, json_schema=json.dumps({"const": "one two three"}), stop=["two"]),
            timeout_s=REQUEST_TIMEOUT_S,
        )
        assert (cut.text, cut.finish_reason) == ('"one ', "stop")
        needs_more = json.dumps({"type": "object", "required": ["a_long_name"]})
        request = build_request(PROMPTS[0], max_tokens=3, json_schema=needs_more)
        short = await client.complete(request, timeout_s=REQUEST_TIMEOUT_S)
        assert short.finish_reason == "length"
        assert short.text.startswith("{")
        whole = await client.complete(
            build_request(PROMPTS[0], max_tokens=900, json_object=True), timeout_s=REQUEST_TIMEOUT_S
        )
        assert whole.finish_reason == "length" or isinstance(json.loads(whole.text), dict)
        async for message in client.stream(build_request(PROMPTS[0], max_tokens=400, regex="[a-z ]*", ignore_eos=True)):
            assert message.token_ids
            break
    await live.until_idle()


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a(b"}, "sampling_params.regex: character 2: unclosed group; send a regular expression without"),
        ({"regex": ""}, "sampling_params.regex: is empty; leave it out"),
        ({"regex": "a" * 70_000}, "sampling_params.regex: has 70000 bytes; send at most 65536"),
        ({"regex": r"[^\s\S]"}, "sampling_params.regex: no output fits it; "),
        ({"json_schema": '{"type": '}, "sampling_params.json_schema: line 1, column 10: not JSON"),
        (
            {"json_schema": json.dumps({"properties": {"a": {"type": "array", "uniqueItems": True}}})},
            "sampling_params.json_schema: #/properties/a/uniqueItems: uniqueItems is not supported; ",
        ),
        ({"grammar": 'start: "a" b\nb: C\n'}, "sampling_params.grammar: line 2, column 4: unknown name"),
        ({"grammar": '%llguidance {"no_forcing": false}\nstart: "a"'}, "sampling_params.grammar: %llguidance may not"),
        ({"choice": {"choices": []}}, "sampling_params.choice: has 0 choices; send 1 to 1024"),
        ({"choice": {"choices": ["a", ""]}}, r"sampling_params.choice.choices\[1\]: has 0 characters"),
    ],
)
async def test_a_constraint_that_cannot_be_is_refused_at_the_door(
    live: LiveMesh, constraint: dict[str, Any], message: str
) -> None:
    async with GenerateClient(live.router) as client:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.generate(build_request("Once", **constraint), timeout_s=REQUEST_TIMEOUT_S)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.match(message, refused.value.details() or "")


async def test_a_hostile_constraint_costs_nobody_else_anything(live: LiveMesh) -> None:
    """It is checked beside the router: other requests go on meanwhile, and the next constraint is checked as usual."""
    hostile = "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + 'A40: "x"\n'
    async with GenerateClient(live.router) as client:
        attempt = asyncio.create_task(
            client.generate(build_request("Once", grammar=hostile), timeout_s=REQUEST_TIMEOUT_S)
        )
        started_s = time.monotonic()
        plain = await client.generate(build_request("Once", max_tokens=8), timeout_s=REQUEST_TIMEOUT_S)
        print(f"\na plain request took {time.monotonic() - started_s:.2f} s beside the check of a hostile constraint")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await attempt
        after = await client.generate(build_request("Once", regex="yes|no"), timeout_s=REQUEST_TIMEOUT_S)
    assert plain.token_ids
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert after.text in ("yes", "no")


async def test_the_examples_of_the_documentation(live: LiveMesh, tmp_path: Path) -> None:
    """Each block in a shell of its own, as a reader would run it; what it prints fits what it asked for."""
    text = (Path(__file__).parents[2] / "docs" / "structured-output.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    environment = {**os.environ, "EXPERTMESH_ROUTER": live.router, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = tmp_path / "expertmesh"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m expertmesh.cli.main "$@"\n', encoding="utf-8")
    command.chmod(0o755)

    async def run(block: str) -> list[str]:
        shell = await asyncio.create_subprocess_exec(
            *("sh", "-e", "-c", block), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            out, err = await asyncio.wait_for(shell.communicate(), REQUEST_TIMEOUT_S)
        finally:
            if shell.returncode is None:
                shell.kill()
                await shell.wait()
        assert shell.returncode == 0, err.decode()
        return out.decode().splitlines()

    (sentence, answer), person, (names,), (whole, plain) = [await run(block) for block in blocks]
    assert re.fullmatch(r"(Tom|Lily) was [0-9]{1,2} years old\.", sentence)
    assert answer in ("yes", "no")
    # Sampled, and a model may write JSON over several lines.
    assert set(json.loads("\n".join(person))) == {"name", "age"}
    assert re.fullmatch(r"[A-Z][a-z]{2,6}(, [A-Z][a-z]{2,6}){1,3}\.", names)
    assert all(type(item) is bool for item in json.loads(json.loads(whole)["text"]))
    assert 1 <= len(json.loads(plain)["token_ids"]) <= 8, "sampled: it may end before"


async def test_an_attention_server_dies_under_constrained_streams(live: LiveMesh) -> None:
    """The matcher is built again from the tokens that the client has: the output goes on as if nothing had happened."""
    await live.until_idle()
    schema = json.dumps({"type": "array", "items": {"type": "string", "maxLength": 20}, "minItems": 8, "maxItems": 8})
    made = [
        build_request(prompt, max_tokens=500, json_schema=schema, temperature=1.0, seed=seed)
        for seed, prompt in enumerate(PROMPTS)
    ]
    async with GenerateClient(live.router) as client:
        expected = await asyncio.gather(*(client.complete(r, timeout_s=REQUEST_TIMEOUT_S) for r in made))
        for answer in expected:
            assert answer.finish_reason == "stop"
            assert len(json.loads(answer.text)) == 8
        running = asyncio.Event()
        tasks = [asyncio.create_task(complete_and_tell(client, request, running)) for request in made]
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await running.wait()
        victim = max(live.attention_servers, key=lambda name: live.metrics(name)["vllm:num_requests_running"])
        live.mesh.kill(victim)
        answers = await asyncio.gather(*tasks)
    assert sum(answer.finish.replays for answer in answers) > 0
    for answer, reference in zip(answers, expected, strict=True):
        assert answer.token_ids == reference.token_ids
        assert answer.text == reference.text
    await until(live.is_whole, REQUEST_TIMEOUT_S, lambda: f"{victim} did not come back\n{logs(live.mesh, 15)}")


async def complete_and_tell(
    client: GenerateClient, request: generate_pb2.GenerateRequest, running: asyncio.Event
) -> Completion:
    """The whole answer; ``running`` is set once it has ten tokens."""
    text, token_ids, last = "", list[int](), generate_pb2.GenerateResponse()
    async for last in client.stream(request, timeout_s=REQUEST_TIMEOUT_S):
        text += last.text
        token_ids += last.token_ids
        if len(token_ids) >= 10:
            running.set()
    return Completion(request_id=last.request_id, text=text, token_ids=token_ids, finish=last.finish)
