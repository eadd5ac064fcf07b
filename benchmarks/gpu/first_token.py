"""The first token of a prompt while others decode, with CUDA graphs of steps with prompts and without.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/first_token.py --layouts b bb:deepep \
        --out benchmarks/results/gpu_first_token.json

Random weights of Qwen3-30B-A3B's shape through the real engine, everything but gRPC. ``b`` = one GPU; ``bb:PLANE`` =
two ``both`` ranks with half of the requests and of the experts each, the prompts all at the first one. While so many
requests decode (0, 16, 64 on all ranks together), prompts of 128 random tokens come one after another, no cached
prefixes. ``ttft_ms`` is the median time from a prompt to its first token on the host, ``ttft_most_ms`` the longest;
``stall_ms`` the median over prompts of the longest time between two steps' tokens meanwhile, ``step_ms`` the median
between two steps' tokens without prompts. ``prompt_graphs`` false: the host enqueues steps with prompts layer by layer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from decode import QWEN3_30B_A3B, build
from decode_two import MAX_BATCHED_TOKENS, Load, begin, draw

from support.gpu_engines import EngineJob, TimedEngine, close_engine, open_engine
from support.gpu_ranks import PlaneConfig, Rank, gpu_ranks

_BETWEEN = 12
"""Steps from one prompt to the next."""
_UNTIMED = 3
"""The first prompts, which may wait for a kernel to be compiled."""
_FIRST = 10_000
"""Handle of the first prompt."""


@dataclass(frozen=True)
class Job:
    """``prompts`` come to rank 0, one after another, while the requests of ``load`` decode."""

    load: Load
    prompts: list[list[int]]
    has_graphs: bool


def make_job(roles: str, decoding: int, tokens_in: int, prompts: int, has_graphs: bool) -> Job:
    steps = draw(roles, decoding, tokens_in, 1).steps_until_all_decode + (prompts + 2) * _BETWEEN
    drawn = np.random.default_rng(_FIRST + decoding).integers(0, QWEN3_30B_A3B["vocab_size"], (prompts, tokens_in))
    return Job(draw(roles, decoding, tokens_in, steps), drawn.tolist(), has_graphs)


def open_alone(rank: Rank, layers: int) -> None:
    with torch.inference_mode(False):  # as ``open_engine`` does it
        parts = argparse.Namespace(layers=layers, requests=[], chunk=[MAX_BATCHED_TOKENS], fp8="off")
        rank.keep["engine"] = build(parts)


def first_tokens(rank: Rank, job: Job) -> dict[str, list[float]]:
    """Seconds on this rank's clock; all ranks make the same number of steps."""
    engine = begin(rank, job.load)
    found: dict[str, list[float]] = {"ttft": [], "stall": []}
    with _graphs_of_prompts(engine, job.has_graphs):
        for _ in range(job.load.steps_until_all_decode + _BETWEEN):
            engine.step()
        found["step"] = np.diff([now for now, _ in engine.landings][-_BETWEEN // 2 :]).tolist()
        for number, prompt in enumerate(job.prompts):
            started = time.perf_counter()
            if rank.rank == 0:
                engine.submit(_FIRST + number, prompt, max_tokens=1)
            for _ in range(_BETWEEN):
                engine.step()
            if number < _UNTIMED:
                continue
            if rank.rank == 0:
                found["ttft"].append(engine.arrivals[_FIRST + number][0] - started)
            if job.load.of(rank):
                times = [now for now, _ in engine.landings]
                found["stall"].append(float(max(np.diff(times[bisect_left(times, started) - 1 :]))))
    engine.run()
    return found


@contextmanager
def _graphs_of_prompts(engine: TimedEngine, are_used: bool) -> Iterator[None]:
    """Unless they ``are_used``, the host enqueues small steps with prompts layer by layer meanwhile."""
    context, before = engine.loop._c, _replays(engine)
    if not are_used:
        engine.loop._c = replace(context, sizes=replace(context.sizes, chunks=()))
    yield
    engine.loop._c = context
    assert are_used == (_replays(engine) > before), "steps with prompts were to replay graphs, or not to"


def _replays(engine: TimedEngine) -> int:
    return sum(count for step, count in engine.graphs.replays.items() if step.has_chunks)


def row_of(layout: str, decoding: int, job: Job, found: list[dict[str, list[float]]]) -> dict[str, Any]:
    def median_ms(name: str) -> float | None:
        times = [seconds for own in found for seconds in own[name]]
        return round(1e3 * statistics.median(times), 2) if times else None

    return {
        "layout": layout,
        "decoding": decoding,
        "tokens_in": len(job.prompts[0]),
        "prompts": len(job.prompts) - _UNTIMED,
        "prompt_graphs": job.has_graphs,
        "ttft_ms": median_ms("ttft"),
        "ttft_most_ms": round(1e3 * max(found[0]["ttft"]), 2),
        "stall_ms": median_ms("stall"),
        "step_ms": median_ms("step"),
    }


def rows_of(layout: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    roles, _, backend = layout.partition(":")
    with tempfile.TemporaryDirectory() as folder, gpu_ranks(len(roles)) as ranks:
        if len(roles) == 1:
            ranks.run(open_alone, arguments.layers)
        else:
            config = {**QWEN3_30B_A3B, "num_hidden_layers": arguments.layers}
            (Path(folder) / "config.json").write_text(json.dumps(config))
            model = {"path": folder, "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 4096}
            sizes = {"max_num_seqs": 256, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "enable_prefix_caching": False}
            plane = PlaneConfig(backend, timeout_s=60.0)
            ranks.run(open_engine, EngineJob(roles, plane, model, sizes, max_num_tokens=MAX_BATCHED_TOKENS))
        for decoding, has_graphs in itertools.product(arguments.decoding, (True, False)):
            job = make_job(roles, decoding, arguments.tokens_in, arguments.prompts + _UNTIMED, has_graphs)
            yield row_of(layout, decoding, job, ranks.run(first_tokens, job))
        if len(roles) > 1:
            ranks.run(close_engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layouts", nargs="+", default=["b"], help="b, or roles by rank:plane")
    parser.add_argument("--decoding", type=int, nargs="+", default=[0, 16, 64])
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--layers", type=int, default=48)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for layout in arguments.layouts:
        for row in rows_of(layout, arguments):
            rows.append(row)
            print(json.dumps(row), flush=True)
            measure.write(arguments.out, {}, rows)


if __name__ == "__main__":
    main()
