"""What streams that generate feel of long prompts, with and without a mesh of its own for prompts.

    python benchmarks/disaggregation.py [--seconds 20] [--pairs 3] [--transport tcp] [--device cpu] [--json FILE]

Together: one mesh of two `both` servers. Apart: a mesh of one that computes prompts and a mesh of one that generates.
Each server has a core of its own in both, with `--device cuda` a GPU. Short prompts with long answers run in a closed
loop; long prompts with short answers arrive at a fixed rate. Rounds of the two alternate on one machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil

from expertmesh.cli.bench_load import Timed
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.v1 import generate_pb2, generate_pb2_grpc

STREAMS, OUTPUT_TOKENS = 4, 64
PROMPT_TOKENS, PROMPTS_PER_S, ANSWER_TOKENS = 400, 2.0, 4
SHORT_TOKENS = 12
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0
VOCABULARY = 1000
"""Token ids below it are in every vocabulary that is served here; what they mean does not matter."""


ON_GPUS = {"device": "cuda", "dataplane.backend": "nccl", "balancer.view_timeout_s": START_TIMEOUT_S}


@dataclass(frozen=True)
class Setting:
    """Where everything computes, and how KV blocks travel between the two meshes."""

    device: str
    transport: str

    def config(self, **overrides: Any) -> MeshConfig:
        base = {"attention.servers": 0, "expert.servers": 0, "attention.max_num_batched_tokens": 512}
        return with_overrides(MeshConfig(), base | (ON_GPUS if self.device == "cuda" else {}) | overrides)


@asynccontextmanager
async def mesh(folder: Path, settings: MeshConfig, places: list[int]) -> AsyncIterator[LocalMesh]:
    """Each of its servers with an attention half on one of the cores or GPUs."""
    started = LocalMesh(settings, StateDir.claim(folder), restart=False)
    # A launcher counts GPUs from 0; each process sees them all, or it could not reach the other's memory.
    order = [*places, *(gpu for gpu in (0, 1) if gpu not in places)]
    try:
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=",".join(map(str, order))):
            await asyncio.to_thread(started.start)
            await asyncio.to_thread(started.wait_ready, START_TIMEOUT_S)
        ranks = [server for server in started.servers.values() if server.role == "both"]
        for server, core in zip(ranks, places, strict=True):
            for thread in psutil.Process(server.pid).threads() if settings.device != "cuda" else ():
                os.sched_setaffinity(thread.id, {core})
        yield started
    finally:
        await asyncio.to_thread(started.stop)


def request(generator: np.random.Generator, prompt_tokens: int, max_tokens: int) -> generate_pb2.GenerateRequest:
    ids = generator.integers(10, VOCABULARY, prompt_tokens).tolist()
    params = generate_pb2.SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return generate_pb2.GenerateRequest(tokenized=generate_pb2.TokenizedInput(input_ids=ids), sampling_params=params)


async def timed(stub: generate_pb2_grpc.GenerationServiceStub, asked: generate_pb2.GenerateRequest) -> Timed:
    started_s = time.perf_counter()
    times_s: list[float] = []
    async for response in stub.Generate(asked, timeout=REQUEST_TIMEOUT_S):
        times_s += [time.perf_counter()] * len(response.token_ids)
    return Timed(sent_s=started_s, token_times_s=tuple(times_s))


async def play(router: str, seconds: float, seed: int) -> dict[str, float]:
    """One round of both kinds of traffic."""
    generator = np.random.default_rng(seed)
    short: list[Timed] = []
    async with rpc.open_channel(router, TlsConfig()) as channel, asyncio.TaskGroup() as group:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        end_s = time.perf_counter() + seconds

        async def stream() -> None:
            while time.perf_counter() < end_s:
                short.append(await timed(stub, request(generator, SHORT_TOKENS, OUTPUT_TOKENS)))

        streams = [group.create_task(stream()) for _ in range(STREAMS)]
        long = []
        for index in range(int(seconds * PROMPTS_PER_S)):
            await asyncio.sleep(max(0.0, end_s - seconds + index / PROMPTS_PER_S - time.perf_counter()))
            long.append(group.create_task(timed(stub, request(generator, PROMPT_TOKENS, ANSWER_TOKENS))))
        await asyncio.gather(*streams, *long)
    gaps_ms = [1e3 * gap for each in short for gap in np.diff(each.token_times_s)]
    ttft_ms = [task.result().ttft_ms for task in long]
    return {
        "token_gap_ms_p50": float(np.percentile(gaps_ms, 50)),
        "token_gap_ms_p99": float(np.percentile(gaps_ms, 99)),
        "token_gap_ms_max": float(np.max(gaps_ms)),
        "tpot_ms_p50": float(np.percentile([each.tpot_ms for each in short], 50)),
        "tpot_ms_p99": float(np.percentile([each.tpot_ms for each in short], 99)),
        "ttft_ms_p50": float(np.percentile(ttft_ms, 50)),
        "ttft_ms_p99": float(np.percentile(ttft_ms, 99)),
        "output_tokens_per_s": sum(len(each.token_times_s) for each in short) / seconds,
    }


async def together(setting: Setting, folder: Path, seconds: float, seed: int) -> dict[str, float]:
    async with mesh(folder / "together", setting.config(both_servers=2), [0, 1]) as started:
        return await play(started.router, seconds, seed)


async def apart(setting: Setting, folder: Path, seconds: float, seed: int) -> dict[str, float]:
    section: dict[str, Any] = {"disaggregation.role": "prefill", "disaggregation.transport": setting.transport}
    async with mesh(folder / "prefill", setting.config(name="prefill", both_servers=1, **section), [0]) as first:
        section |= {"disaggregation.role": "decode", "disaggregation.prefill_balancer": first.balancer}
        async with mesh(folder / "decode", setting.config(name="decode", both_servers=1, **section), [1]) as second:
            return await play(second.router, seconds, seed)


async def alternate(setting: Setting, pairs: int, seconds: float) -> dict[str, list[dict[str, float]]]:
    """Rounds of both kinds, each first in turn."""
    rounds: dict[str, list[dict[str, float]]] = {"together": [], "apart": []}
    for pair in range(pairs):
        for kind, round_ in islice(cycle((("together", together), ("apart", apart))), pair % 2, pair % 2 + 2):
            with tempfile.TemporaryDirectory(prefix="expertmesh-disaggregation-") as folder:
                figures = await round_(setting, Path(folder), seconds, pair)
            rounds[kind].append(figures)
            print(kind, {name: round(value, 1) for name, value in figures.items()}, file=sys.stderr, flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of a round")
    parser.add_argument("--pairs", type=int, default=3, help="of rounds")
    parser.add_argument("--transport", choices=("auto", "tcp", "nixl"), default="auto", help="of KV blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: two GPUs")
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    load_before = os.getloadavg()
    setting = Setting(arguments.device, arguments.transport)
    rounds = asyncio.run(alternate(setting, arguments.pairs, arguments.seconds))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
        "load_average_before": [round(value, 2) for value in load_before],
        "settings": {
            "streams": STREAMS,
            "output_tokens": OUTPUT_TOKENS,
            "long_prompt_tokens": PROMPT_TOKENS,
            "long_prompts_per_s": PROMPTS_PER_S,
            "round_s": arguments.seconds,
            "device": setting.device,
            "transport": setting.transport,
        },
        "median_of_rounds": {
            kind: {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}
            for kind, rows in rounds.items()
        },
        "rounds": {kind: [{k: round(v, 2) for k, v in row.items()} for row in rows] for kind, rows in rounds.items()},
    }
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
