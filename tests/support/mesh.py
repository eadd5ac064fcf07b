"""Real meshes for tests: every service its own process, on ports of its own, in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

START_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 120.0
PROMPTS_FILE = Path(__file__).parents[2] / "demo/prompts.jsonl"


@dataclass(frozen=True)
class DemoPrompt:
    domain: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished generation, put together from its stream."""

    text: str
    token_ids: list[int]
    finish: generate_pb2.Finish
    logprobs: list[generate_pb2.TokenLogprob] = field(default_factory=list)


def demo_prompts() -> list[DemoPrompt]:
    """The prompts that the project ships, at least four a domain."""
    lines = PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    return [DemoPrompt(domain=item["domain"], text=item["prompt"]) for item in map(json.loads, lines)]


def mesh_config(**overrides: Any) -> MeshConfig:
    """The default configuration with keys replaced, their dots written as two underscores: ``attention__servers=1``."""
    return with_overrides(MeshConfig(), {key.replace("__", "."): value for key, value in overrides.items()})


def start_mesh(state_dir: Path, config: MeshConfig, *, restart: bool = False) -> LocalMesh:
    """A mesh that serves. The caller stops it. ``restart``: services that die are started again."""
    return started(LocalMesh(config, StateDir.claim(state_dir), restart=restart))


def started(mesh: LocalMesh) -> LocalMesh:
    """The same, once it serves; one that does not come to that is stopped and shows its logs."""
    try:
        mesh.start()
        mesh.wait_ready(START_TIMEOUT_S)
    except BaseException:
        mesh.stop()
        print(logs(mesh))
        raise
    return mesh


@contextmanager
def kept_down(mesh: LocalMesh, server_id: str) -> Iterator[None]:
    """SIGKILL one service; supervision starts it again when the context ends, and not before."""
    server = mesh.servers[server_id]
    server.hold_restarts()
    try:
        server.kill(signal.SIGKILL)
        yield
    finally:
        server.allow_restarts()


def logs(mesh: LocalMesh, lines: int = 60) -> str:
    """The end of every service's log: what a failing test prints."""
    parts = []
    for path in sorted(mesh.state_dir.glob("*.log")):
        parts += [f"--- {path.name}", *path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]]
    return "\n".join(parts)


class Meshes:
    """Starts meshes on demand and keeps the last one, so that tests with the same configuration share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config: MeshConfig | None = None
        self._mesh: LocalMesh | None = None
        self._count = 0

    def get(self, **overrides: Any) -> LocalMesh:
        """A mesh that serves, with ``mesh_config(**overrides)``; one of another configuration is stopped first."""
        config = mesh_config(**overrides)
        if self._mesh is not None and config == self._config and _all_alive(self._mesh):
            return self._mesh
        self.stop()
        self._count += 1
        self._mesh, self._config = start_mesh(self._folder / f"mesh-{self._count}", config), config
        return self._mesh

    def stop(self) -> None:
        if self._mesh is not None:
            self._mesh.stop()
        self._mesh = self._config = None


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meshes]:
    """Meshes of one test module; at most one runs at a time."""
    running = Meshes(tmp_path_factory.mktemp("meshes"))
    yield running
    running.stop()


def _all_alive(mesh: LocalMesh) -> bool:
    return all(server.pid is not None for server in mesh.servers.values())


def greedy_request(prompt: str | Sequence[int], max_tokens: int, **sampling: Any) -> generate_pb2.GenerateRequest:
    """A greedy request for text or token ids; ``sampling`` adds fields of ``SamplingParams``."""
    params = generate_pb2.SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, **sampling})
    if isinstance(prompt, str):
        return generate_pb2.GenerateRequest(text=prompt, sampling_params=params)
    tokenized = generate_pb2.TokenizedInput(input_ids=prompt)
    return generate_pb2.GenerateRequest(tokenized=tokenized, sampling_params=params)


async def generate_all(
    router: str, requests: Sequence[generate_pb2.GenerateRequest], *, concurrency: int
) -> list[Output]:
    """Every request's output, in order, with at most ``concurrency`` running at a time.

    Raises:
        grpc.aio.AioRpcError: a request failed; the others are cancelled.
    """
    slots = asyncio.Semaphore(concurrency)
    async with rpc.open_channel(router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)

        async def run(request: generate_pb2.GenerateRequest) -> Output:
            async with slots:
                return await collect(stub, request)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(request)) for request in requests]
    return [task.result() for task in tasks]


async def collect(stub: generate_pb2_grpc.GenerationServiceStub, request: generate_pb2.GenerateRequest) -> Output:
    """Read one stream to its end; exactly the last message has to carry ``finish``."""
    text, token_ids, logprobs = "", list[int](), list[generate_pb2.TokenLogprob]()
    finish: generate_pb2.Finish | None = None
    async for message in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
        assert finish is None, "a message came after the finish"
        text += message.text
        token_ids += message.token_ids
        logprobs += message.logprobs
        if message.HasField("finish"):
            finish = message.finish
    assert finish is not None, "the stream ended without a finish"
    return Output(text=text, token_ids=token_ids, finish=finish, logprobs=logprobs)
