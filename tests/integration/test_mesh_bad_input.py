"""Wrong requests and wrong settings: the right status, a message that says what to change, a mesh that goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from safetensors.torch import load_file, save_file

from expertmesh.mesh import rpc
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from support.checkpoints import write_checkpoint
from support.live_mesh import LiveMesh
from support.mesh import REQUEST_TIMEOUT_S

pytestmark = pytest.mark.slow

NAN, INFINITY = float("nan"), float("inf")
MAX_MODEL_LEN = 1024  # of the demo model
VOCAB_SIZE = 8192
START_TIMEOUT_S = 120

Request = generate_pb2.GenerateRequest


def ask(prompt: Any = "Once there was", **fields: Any) -> Request:
    return build_request(prompt, **{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **fields})


INVALID, EXHAUSTED, NOT_FOUND = "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "NOT_FOUND"

# name: the request, its status, and what the message says: the field, then the remedy
BAD_REQUESTS: dict[str, tuple[Callable[[], Request], str, tuple[str, str]]] = {
    "empty text": (lambda: ask(""), INVALID, ("text: the prompt is empty", "send at least one token")),
    "empty ids": (lambda: ask([]), INVALID, ("tokenized.input_ids: the prompt is empty", "send at least one token")),
    "no prompt": (lambda: Request(), INVALID, ("input: there is no prompt", "set one of text, tokenized, chat")),
    "long text": (lambda: ask("word " * 3000), INVALID, ("text: ", f"send at most {MAX_MODEL_LEN - 1} tokens")),
    "long ids": (
        lambda: ask([5] * MAX_MODEL_LEN),
        INVALID,
        ("tokenized.input_ids: ", f"send at most {MAX_MODEL_LEN - 1} tokens"),
    ),
    "id out of range": (
        lambda: ask([5, VOCAB_SIZE]),
        INVALID,
        (f"tokenized.input_ids: token id {VOCAB_SIZE} at position 1", f"use ids in [0, {VOCAB_SIZE - 1}]"),
    ),
    "largest id": (lambda: ask([2**32 - 1]), INVALID, ("tokenized.input_ids: token id 4294967295", "use ids in [0, ")),
    "temperature < 0": (lambda: ask(temperature=-0.5), INVALID, ("sampling_params.temperature: is -0.5", "0 (greedy)")),
    "temperature NaN": (lambda: ask(temperature=NAN), INVALID, ("sampling_params.temperature: is nan", "finite value")),
    "temperature inf": (
        lambda: ask(temperature=INFINITY),
        INVALID,
        ("sampling_params.temperature: is inf", "finite value"),
    ),
    "top_p 0": (lambda: ask(top_p=0.0), INVALID, ("sampling_params.top_p: is 0", "(0, 1]")),
    "top_p > 1": (lambda: ask(top_p=1.5), INVALID, ("sampling_params.top_p: is 1.5", "(0, 1]")),
    "top_p NaN": (lambda: ask(top_p=NAN), INVALID, ("sampling_params.top_p: is nan", "(0, 1]")),
    "max_tokens 0": (lambda: ask(max_tokens=0), INVALID, ("sampling_params.max_tokens: is 0", "use 1 or more")),
    "max_tokens < 0": (lambda: ask(max_tokens=-7), INVALID, ("sampling_params.max_tokens: is -7", "use 1 or more")),
    "min_tokens > max_tokens": (
        lambda: ask(min_tokens=9),
        INVALID,
        ("sampling_params.min_tokens: is 9", "raise sampling_params.max_tokens"),
    ),
    "100 stop strings": (
        lambda: ask(stop=[f"stop {i}" for i in range(100)]),
        INVALID,
        ("sampling_params.stop: has 100 strings", "send at most 16"),
    ),
    "logit_bias out of range": (
        lambda: ask(logit_bias={VOCAB_SIZE: 1.0}),
        INVALID,
        ("sampling_params.logit_bias: token id 8192", "use ids in"),
    ),
    "prompt over max_prompt_bytes": (
        lambda: ask("x" * (4 * 2**20 + 1)),
        INVALID,
        ("text: the prompt has 4194305 bytes", "send at most 4194304 (router.max_prompt_bytes)"),
    ),
    "50 MB prompt": (
        lambda: ask("x" * 50_000_000),
        INVALID,
        ("text: the prompt has 50000000 bytes", "send at most 4194304 (router.max_prompt_bytes)"),
    ),
    # gRPC refuses it before the router sees a byte, so that nobody's prompt can fill the memory; the words are gRPC's.
    "message over max_message_bytes": (
        lambda: ask("x" * 68_000_000),
        EXHAUSTED,
        ("Received message larger than max", "vs. 67108864"),
    ),
    "unknown model": (
        lambda: ask(model="gpt-5"),
        NOT_FOUND,
        ("model: 'gpt-5' is not served here", "ask for 'expertmesh-demo' or leave the field empty"),
    ),
    "request_id with control characters": (
        lambda: ask(request_id="a\nb"),
        INVALID,
        ("request_id: ", "use printable characters"),
    ),
}

NO_MESSAGES: dict[str, bytes] = {
    "text is no UTF-8": ask("MARK").SerializeToString().replace(b"MARK", b"\xff\xfe\xc3\x28"),
    "stop is no UTF-8": ask(stop=["MARK"]).SerializeToString().replace(b"MARK", b"\xc3\x28\xc3\x28"),
    "model is no UTF-8": ask(model="MARK").SerializeToString().replace(b"MARK", b"gpt\xff"),
    "truncated": ask().SerializeToString()[:-1],
}


@contextlib.asynccontextmanager
async def refused(code: str, *words: str) -> AsyncIterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        yield
    assert refusal.value.code().name == code, refusal.value
    for word in words:
        assert word in (refusal.value.details() or "")


async def assert_good_request(live: LiveMesh) -> None:
    """The same greedy request always, compared with what it gave the first time it was ever asked."""
    async with GenerateClient(live.router) as client:
        answer = await client.complete(ask("The goat looked at the hole in"), timeout_s=REQUEST_TIMEOUT_S)
    assert (answer.finish_reason, len(answer.token_ids)) == ("length", 8)
    assert answer.token_ids == GOOD_ANSWER.setdefault("tokens", answer.token_ids)


GOOD_ANSWER: dict[str, list[int]] = {}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_bad_request(live: LiveMesh, name: str) -> None:
    make, code, words = BAD_REQUESTS[name]
    request = make()
    async with GenerateClient(live.router) as client:
        async with refused(code, *words):
            await client.complete(request, timeout_s=REQUEST_TIMEOUT_S)
        async with refused(code, *words):
            await client.generate(request, timeout_s=REQUEST_TIMEOUT_S)
    await assert_good_request(live)


@pytest.mark.parametrize("name", NO_MESSAGES)
async def test_bytes_that_are_no_message(live: LiveMesh, name: str) -> None:
    data = NO_MESSAGES[name]
    async with rpc.open_channel(live.router, TlsConfig()) as channel:
        unary: Any = channel.unary_unary("/expertmesh.v1.GenerationService/GenerateUnary")
        stream: Any = channel.unary_stream("/expertmesh.v1.GenerationService/Generate")
        for call in (unary(data, timeout=30), anext(aiter(stream(data, timeout=30)))):
            async with refused(INVALID, "request: its bytes are no valid message", "send protobuf with UTF-8 strings"):
                await call
    await assert_good_request(live)


async def test_client_whose_connection_breaks(live: LiveMesh) -> None:
    """No goodbye: its socket is reset in mid-stream."""
    async with CuttableWire(live.router) as wire, GenerateClient(wire.address) as client:
        streams = [
            aiter(client.stream(ask([5, 6, 7 + i], max_tokens=900), timeout_s=REQUEST_TIMEOUT_S)) for i in range(8)
        ]
        await asyncio.gather(*(anext(stream) for stream in streams))
        wire.cut()
        for stream in streams:
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stream:
                    pass
    await live.until_idle()
    await assert_good_request(live)


async def test_client_that_never_reads(live: LiveMesh) -> None:
    # Without these the client's own buffers take all that a demo-sized answer holds.
    options = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
    async with rpc.open_channel(live.router, TlsConfig(), options=options) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate(ask("Once", max_tokens=900, logprobs=20), timeout=REQUEST_TIMEOUT_S)
        await call.wait_for_connection()
        started_s = time.monotonic()
        await until_dropped(live)
        print(f"\nblocks are back {time.monotonic() - started_s:.1f} s after a request that nobody reads")
        await assert_good_request(live)
        async with refused(EXHAUSTED, "router.client_stall_timeout_s", "read the stream as it comes"):
            async for _ in call:
                pass


async def until_dropped(live: LiveMesh) -> None:
    assert any(live.metrics(server_id)["vllm:num_requests_running"] for server_id in live.attention_servers)
    await live.until_idle()


class CuttableWire:
    """A TCP proxy to ``target`` whose connections can be reset."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> CuttableWire:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.address = "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cut()
        await self._server.wait_closed()

    def cut(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection(*self._target)
        self._writers += [writer, target_writer]
        async with asyncio.TaskGroup() as group:
            group.create_task(self._copy(reader, target_writer))
            group.create_task(self._copy(target_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()


# -- start-up -------------------------------------------------------------------------------------------------------


def lack_a_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def change_a_shape(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if "experts.3" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, shard)


def change_the_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))


def expertmesh(folder: Path, *arguments: str, yaml: str = "{}") -> subprocess.CompletedProcess[str]:
    (folder / "mesh.yaml").write_text(yaml)
    command = [sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments, "--config", "mesh.yaml"]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S, check=False
    )


def assert_user_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lack_a_shard, ("model-00002-of-00002.safetensors", "missing")),
        (change_a_shape, ("experts.3.", "has shape", "config.json asks for")),
        (change_the_architecture, ("LlamaForCausalLM", "Qwen3MoeForCausalLM")),
    ],
)
def test_damaged_checkpoint(tmp_path: Path, damage: Callable[[Path], None], words: tuple[str, ...]) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    damage(model)
    result = expertmesh(tmp_path, "up", "--model", str(model), "--attention", "1", "--experts", "1")
    assert_user_error(result, *words)


def test_fewer_slots_than_experts(tmp_path: Path) -> None:
    result = expertmesh(tmp_path, "serve", "expert", "--balancer", "127.0.0.1:1", yaml="expert: {num_slots: 31}")
    assert_user_error(result, "expert.num_slots: 31 slots cannot hold the model's 32 experts", "set it to 32 or more")


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_router_port_in_use(tmp_path: Path, taken_port: int) -> None:
    yaml = f"router: {{port: {taken_port}}}"
    result = expertmesh(tmp_path, "serve", "router", "--balancer", "127.0.0.1:1", yaml=yaml)
    assert_user_error(result, f"router.port: 127.0.0.1:{taken_port} cannot be bound", "choose a free port")


def test_balancer_port_in_use(tmp_path: Path, taken_port: int) -> None:
    result = expertmesh(tmp_path, "up", yaml=f"balancer: {{port: {taken_port}}}")
    assert_user_error(result, f"balancer.port: 127.0.0.1:{taken_port} cannot be bound", "choose a free port")


def test_unknown_configuration_keys(tmp_path: Path) -> None:
    result = expertmesh(tmp_path, "up", yaml="{expert: {slots: 3}, routers: 2}")
    assert_user_error(result, "expert.slots: unknown key", "routers: unknown key", "docs/configuration.md")
