"""The engines of a view's ranks on GPUs, a process each (``gpu_ranks``): all of a mesh but gRPC and the balancer."""

from __future__ import annotations

import gc
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # not in torch's __all__

from expertmesh.attention_server.outputs import Output
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.dataplane.factory import open_on_device
from expertmesh.mesh.framing import Link
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.model.weights import open_checkpoint
from expertmesh.mesh.view import ViewInfo
from support.engine_driver import TimedDriver
from support.gpu_ranks import PlaneConfig, Rank
from support.solo_rank import EngineRank
from support.thread_ranks import plane_shape, view_proto

_COME_S = 180.0


@dataclass(frozen=True)
class EngineJob:
    """``roles`` by rank: 'a', 'e' or 'b'. ``model``: keys of ``ModelConfig``. ``config``: keys of ``attention``."""

    roles: str
    plane: PlaneConfig
    model: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    uses_graphs: bool = True
    max_num_tokens: int = 512
    micro_batches: int = 1


@dataclass(frozen=True)
class Request:
    rank: int
    handle: int
    prompt: Sequence[int]
    sampling: dict[str, Any]


class TimedEngine(TimedDriver, EngineRank):
    """One rank of a view, which notes when tokens reach the host."""


def open_engine(rank: Rank, job: EngineJob) -> None:
    """Build this rank's engine; ``rank.keep`` holds it."""
    model = ModelConfig(**{**job.model, "path": Path(job.model["path"])})
    spec = load_spec(model)
    checkpoint = open_checkpoint(model, spec, rank.device, lambda num_bytes: None)
    slots_per_rank = -(-spec.num_experts // sum(role in "eb" for role in job.roles))
    view = ViewInfo(view_proto(spec, job.roles, slots_per_rank), rank.rank)
    links = _links(rank)
    config: Any = job.plane
    shape = plane_shape(spec, view, job.max_num_tokens)
    plane = open_on_device(
        config, PrefixStore(f"plane/{rank.view}/", rank.store), shape, rank.device, ["node"] * rank.size, _COME_S
    )
    rank.keep["links"], rank.keep["plane"] = links, plane
    with torch.inference_mode(False):  # weights are read by threads that are not in it
        rank.keep["engine"] = _engine(rank, job, spec, checkpoint, view)


def _engine(rank: Rank, job: EngineJob, spec: ModelSpec, checkpoint: Checkpoint, view: ViewInfo) -> TimedEngine:
    return TimedEngine(
        spec,
        checkpoint,
        rank.device,
        view,
        rank.keep["plane"],
        rank.keep["links"],
        uses_graphs=job.uses_graphs,
        max_num_tokens=job.max_num_tokens,
        micro_batches=job.micro_batches,
        **job.config,
    )


def close_engine(rank: Rank) -> None:
    engine, plane = rank.keep.pop("engine"), rank.keep.pop("plane")
    plane.stop()
    engine.close()
    plane.close()
    for link in rank.keep.pop("links").values():
        link.close()
    del engine, plane
    gc.collect()  # its parts know each other
    torch.cuda.empty_cache()


def generate(rank: Rank, requests: Sequence[Request]) -> dict[int, list[Output]]:
    """The outputs of this rank's requests, by handle; all ranks take part until nobody has work."""
    engine: TimedEngine = rank.keep["engine"]
    engine.reset()
    submit(engine, rank, requests)
    rank.store.set(f"submitted/{rank.view}/{rank.rank}", "")
    rank.store.wait([f"submitted/{rank.view}/{peer}" for peer in range(rank.size)])
    engine.run()
    return engine.outputs


def submit(engine: EngineRank, rank: Rank, requests: Sequence[Request]) -> None:
    for request in requests:
        if request.rank == rank.rank:
            engine.submit(request.handle, request.prompt, **request.sampling)


def num_captures(rank: Rank) -> int:
    engine: TimedEngine = rank.keep["engine"]
    return engine.graphs.num_captures if engine.graphs is not None else 0


def num_replays(rank: Rank) -> tuple[int, int]:
    """Of graphs of decode steps, and of steps with chunks of prompts."""
    engine: TimedEngine = rank.keep["engine"]
    replays = engine.graphs.replays if engine.graphs is not None else Counter()
    chunks = sum(count for step, count in replays.items() if step.has_chunks)
    return replays.total() - chunks, chunks


def _links(rank: Rank) -> dict[int, Link]:
    """Rank 0 leads; the others call it."""
    key = f"lockstep/{rank.view}"
    if rank.rank:
        port = int(rank.store.get(key))
        sock = socket.create_connection(("127.0.0.1", port), timeout=_COME_S)
        sock.sendall(bytes([rank.rank]))
        return {0: Link(sock, 0)}
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_COME_S)
        rank.store.set(key, str(server.getsockname()[1]))
        links = {}
        for _ in range(1, rank.size):
            sock, _ = server.accept()
            peer = sock.recv(1)[0]
            links[peer] = Link(sock, peer)
        return links
