"""``expertmesh generate`` as a process, against a router with a scripted attention server."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.fake_attention import FakeAttention, expected_tokens
from support.router_stand import TIMEOUT_S, Stand, stand

__all__ = ["stand"]


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "expertmesh.cli.main", "generate", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )


async def end_of(process: asyncio.subprocess.Process) -> Ended:
    async with asyncio.timeout(TIMEOUT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def run(*arguments: str) -> Ended:
    return await end_of(await start(*arguments))


@pytest.mark.slow
async def test_json_contract(stand: Stand) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    ended = await run("Once upon", "--max-tokens=6", "--seed=3", "--json", "--logprobs=1", "--router", stand.address)
    assert ended.status == 0, ended.err
    shown = json.loads(ended.out)
    assert set(shown) == {
        *("text", "token_ids", "prompt_tokens", "finish_reason", "ttft_ms", "request_id", "logprobs"),
    }
    prompt = list(server.submits[0].prompt_token_ids)
    assert shown["token_ids"] == expected_tokens(prompt, 3, 6)
    assert (shown["prompt_tokens"], shown["finish_reason"]) == (len(prompt), "length")
    assert shown["text"]
    assert shown["ttft_ms"] > 0


@pytest.mark.slow
async def test_several_prompts_come_in_order(stand: Stand, tmp_path: Path) -> None:
    await stand.start([FakeAttention("a0")])
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": [9, number], "max_tokens": 20 - number, "seed": 1, "domain": "x"} for number in range(10)]
    lines[4]["max_tokens"] = -1
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    ended = await run("first", "--json", "--prompts", str(file), "--concurrency=8", "--router", stand.address)
    assert ended.status == 1
    assert ended.err.startswith(f"error: {file}:5: INVALID_ARGUMENT: sampling_params.max_tokens: is -1")
    shown = [json.loads(line) for line in ended.out.splitlines()]
    assert len(shown) == 11
    for number, line in enumerate(shown[1:]):
        if number == 4:
            assert line["error"].startswith("INVALID_ARGUMENT")
        else:
            assert line["token_ids"] == expected_tokens([9, number], 1, 20 - number)


@pytest.mark.slow
async def test_streams_text_and_ends_the_line(stand: Stand) -> None:
    client = await stand.start([FakeAttention("a0")])
    ended = await run("Once upon", "--max-tokens=5", "--seed=3", "--router", stand.address)
    as_json = json.loads(
        (await run("Once upon", "--max-tokens=5", "--seed=3", "--json", "--router", stand.address)).out
    )
    assert (ended.status, ended.out) == (0, as_json["text"].removesuffix("\n") + "\n")
    del client


@pytest.mark.slow
async def test_refusals_and_usage_errors(stand: Stand, tmp_path: Path) -> None:
    await stand.start([FakeAttention("a0")])
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": "many"}\n', encoding="utf-8")
    no_json = tmp_path / "none.jsonl"
    no_json.write_text('{"prompt": "a"}\nprompt: b\n', encoding="utf-8")
    cases: list[tuple[list[str], int, str]] = [
        (["x", "--temperature=-1"], 1, "error: INVALID_ARGUMENT: sampling_params.temperature: is -1"),
        (["x", "--model=other"], 1, "error: NOT_FOUND: model"),
        (["", "--json"], 1, "error: INVALID_ARGUMENT: text: the prompt is empty"),
        ([], 2, "error: PROMPT: there is none"),
        (["--prompts", str(tmp_path / "nowhere.jsonl")], 2, "cannot be read"),
        (["--prompts", str(bad_line)], 2, f"error: {bad_line}:2: max_tokens is 'many'"),
        (["--prompts", str(no_json)], 2, f"error: {no_json}:2: is not JSON"),
        (["x", "--seed", str(2**64)], 2, "PROMPT 1: cannot be sent"),
        (["x", "--timeout=0"], 2, "error: --timeout"),
    ]
    ends = await asyncio.gather(*(run(*arguments, "--router", stand.address) for arguments, _, _ in cases))
    for (arguments, status, message), ended in zip(cases, ends, strict=True):
        assert (ended.status, message in ended.err, ended.out) == (status, True, ""), (arguments, ended)
        assert "Traceback" not in ended.err
    unreachable = await run("x", "--router", "127.0.0.1:1")
    assert (unreachable.status, unreachable.err.startswith("error: UNAVAILABLE: ")) == (1, True)


@pytest.mark.slow
async def test_interrupt_cancels_the_request(stand: Stand) -> None:
    server = FakeAttention("a0")
    await stand.start([server])
    server.going.clear()
    process = await start("Once upon", "--router", stand.address)
    await server.until(lambda: server.num_running == 1, TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    ended = await end_of(process)
    assert (ended.status, ended.err) == (130, "interrupted\n")
    await server.until(lambda: server.num_running == 0)


@pytest.mark.slow
def test_neither_router_nor_generate_imports_torch() -> None:
    code = (
        "import sys, expertmesh.cli.generate, expertmesh.router.server as server\n"
        "from expertmesh.mesh.config import ModelConfig\n"
        "server.load_router_model(ModelConfig())\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=TIMEOUT_S).returncode == 0
