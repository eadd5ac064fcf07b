"""Speculation in a mesh of real processes, 2 attention and 2 expert servers: the tokens are those without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc
from support import mesh_state
from support.families import load_reference
from support.mesh import REQUEST_TIMEOUT_S, Meshes, Output, generate_all, greedy_request
from support.mtp import LAYERS, make_mtp_checkpoint
from support.reference import continuation

pytestmark = pytest.mark.slow

NUM_TOKENS = 64
TOKENS_BEFORE_THE_KILL = 8
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "presence_penalty": 0.2, "ignore_eos": True}


def transformers_answers(path: Path, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    model = load_reference(path)
    return [continuation(model, prompt, NUM_TOKENS) for prompt in prompts]


async def test_same_tokens_whatever_dies(meshes: Meshes, tmp_path: Path) -> None:
    # Drafts of this layer are right now and then.
    path = make_mtp_checkpoint(tmp_path / "model", seed=5, loudness=0.2, vocab_size=8192)
    prompts = [tuple(range(2 + 31 * i, 9 + 31 * i + 11 * i)) for i in range(6)]
    answers = transformers_answers(path, prompts)
    mesh = meshes.get(
        model__path=path,
        speculation__method="mtp",
        attention__servers=2,
        expert__servers=2,
        expert__num_slots=10,
        attention__max_num_batched_tokens=48,
        telemetry__metrics_port=0,
    )
    assert list((await mesh_state.status(mesh)).model.moe_layers)[-1] == LAYERS

    async def ask(**sampling: Any) -> list[Output]:
        requests = [greedy_request(prompt, NUM_TOKENS, **{"ignore_eos": True, **sampling}) for prompt in prompts]
        return await generate_all(mesh.router, requests, concurrency=len(requests))

    assert [output.token_ids for output in await ask()] == answers
    again = await ask()
    assert [output.token_ids for output in again] == answers
    assert any(output.finish.cached_tokens for output in again)
    sampled = [output.token_ids for output in await ask(**SAMPLED, logprobs=1)]
    await mesh_state.until_idle(mesh, REQUEST_TIMEOUT_S)
    drafted, accepted = count(mesh)
    assert 0 < accepted < drafted
    assert [output.token_ids for output in await ask(**SAMPLED, disable_speculation=True)] == sampled
    assert count(mesh) == (drafted, accepted)
    streams = [Stream(greedy_request(prompt, NUM_TOKENS, ignore_eos=True)) for prompt in prompts]
    await read_and_kill(mesh, "attention-0", streams)
    assert [stream.token_ids for stream in streams] == answers
    assert sum(stream.finish.replays for stream in streams if stream.finish is not None) > 0


def count(mesh: LocalMesh) -> tuple[float, float]:
    """Tokens drafted and accepted, on both attention servers."""
    servers = [mesh_state.metrics(mesh, f"attention-{number}") for number in range(2)]
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    drafted, accepted = (sum(metrics[name] for metrics in servers) for name in names)
    return drafted, accepted


class Stream:
    def __init__(self, request: generate_pb2.GenerateRequest) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.finish: generate_pb2.Finish | None = None
        self.runs = asyncio.Event()

    async def read(self, stub: generate_pb2_grpc.GenerationServiceStub) -> None:
        async for message in stub.Generate(self.request, timeout=REQUEST_TIMEOUT_S):
            self.token_ids += message.token_ids
            if len(self.token_ids) >= TOKENS_BEFORE_THE_KILL:
                self.runs.set()
            if message.HasField("finish"):
                self.finish = message.finish


async def read_and_kill(mesh: LocalMesh, server_id: str, streams: list[Stream]) -> None:
    async with rpc.open_channel(mesh.router, TlsConfig()) as channel, asyncio.TaskGroup() as group:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        for stream in streams:
            group.create_task(stream.read(stub))
        for stream in streams:
            await asyncio.wait_for(stream.runs.wait(), REQUEST_TIMEOUT_S)
        assert any(stream.finish is None for stream in streams), "too late: all streams have ended"
        mesh.kill(server_id)
