"""Decoding on two GPUs, colocated and apart: random weights of Qwen3-30B-A3B's shape, through the real engine.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/decode_two.py --out benchmarks/results/gpu_decode_two.json

``bb`` = two ranks with both halves, half of the requests and of the experts each; ``ae`` = one rank with the attention
half and all requests, one with all experts. As ``decode.py`` otherwise, whose docstring says what the columns mean:
all requests submitted at once, 128 random tokens in, 128 out, greedy, no cached prefixes, everything but gRPC.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from decode import QWEN3_30B_A3B

from expertmesh.mesh.graphs import round_up
from support.gpu_engines import EngineJob, Request, TimedEngine, close_engine, open_engine, submit
from support.gpu_ranks import PlaneConfig, Rank, Ranks, gpu_ranks

VLLM_MS = {64: 10.8, 256: 14.4, 512: 18.2}
"""vLLM 0.26.0 on two H200s, its best mode offline (tensor parallel attention, expert parallel experts): median ms per
token, the same model shape and load."""
MAX_BATCHED_TOKENS = 8192
_REPLAYS = 20
_PROFILED_STEPS = 8


@dataclass(frozen=True)
class Load:
    """``requests`` over all ranks."""

    requests: Sequence[Request]
    tokens_in: int
    tokens_out: int

    def of(self, rank: Rank) -> int:
        return sum(request.rank == rank.rank for request in self.requests)

    @property
    def steps_until_all_decode(self) -> int:
        """The last prompt has been computed by then on every rank, whose steps are the same ones."""
        return -(-len(self.requests) * self.tokens_in // MAX_BATCHED_TOKENS) + 3


def draw(roles: str, requests: int, tokens_in: int, tokens_out: int) -> Load:
    hosts = [rank for rank, role in enumerate(roles) if role in "ab"]
    prompts = np.random.default_rng(requests).integers(0, QWEN3_30B_A3B["vocab_size"], (requests, tokens_in))
    sampling = {"max_tokens": tokens_out}
    drawn = [Request(hosts[i % len(hosts)], i, prompt, sampling) for i, prompt in enumerate(prompts.tolist())]
    return Load(drawn, tokens_in, tokens_out)


def begin(rank: Rank, load: Load) -> TimedEngine:
    """All ranks have submitted their requests when this returns."""
    engine: TimedEngine = rank.keep["engine"]
    engine.reset()
    submit(engine, rank, load.requests)
    count = rank.keep["barriers"] = rank.keep.get("barriers", 0) + 1
    keys = [f"begin/{rank.view}/{count}/{peer}" for peer in range(rank.size)]
    rank.store.set(keys[rank.rank], "")
    rank.store.wait(keys)
    return engine


def run_load(rank: Rank, load: Load) -> dict[str, Any]:
    """Times of this rank's requests, on this machine's clock."""
    engine = begin(rank, load)
    started = time.perf_counter()
    engine.run()
    assert all(len(times) == load.tokens_out for times in engine.arrivals.values())
    full = [now for now, number in engine.landings if number == load.of(rank)]
    return {"started": started, "arrivals": engine.arrivals, "full_steps": np.diff(full).tolist()}


def slot_load(rank: Rank, load: Load) -> Any:
    """Rows of each layer's slots in one decode step of this rank's tokens, [L, G] as lists; None without any."""
    engine = begin(rank, load)
    for _ in range(load.steps_until_all_decode):
        engine.step()
    found = None
    if load.of(rank):
        torch.cuda.synchronize()
        engine.half.routing.slot_load_LG.zero_()
    engine.step()
    if load.of(rank):
        torch.cuda.synchronize()
        found = engine.half.routing.slot_load_LG.tolist()
    engine.run()
    return found


def time_graph(rank: Rank, load: Load) -> float:
    """Milliseconds of a decode step's graph, replayed on all ranks over and over while all requests decode."""
    engine = begin(rank, load)
    for _ in range(load.steps_until_all_decode):
        engine.step()
    assert engine.graphs is not None, "there is a GPU"
    size = round_up(max(load.of(Rank(peer, rank.size, rank.store, rank.device)) for peer in range(rank.size)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    engine.graphs.replay(size)
    start.record()
    for _ in range(_REPLAYS):
        engine.graphs.replay(size)
    end.record()
    end.synchronize()
    engine.run()
    return start.elapsed_time(end) / _REPLAYS


def profile(rank: Rank, load: Load) -> list[dict[str, Any]]:
    """What the kernels of a decode step take on this rank, summed up by name."""
    engine = begin(rank, load)
    for _ in range(load.steps_until_all_decode + 8):
        engine.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.run()
    found = [event for event in profiler.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {
            "kernel": event.key[:90],
            "launches_a_step": round(event.count / _PROFILED_STEPS, 1),
            "us_a_step": round(event.self_device_time_total / _PROFILED_STEPS, 1),
        }
        for event in found
    ]


def measure_load(ranks: Ranks, layout: str, load: Load) -> dict[str, Any]:
    few = Load([Request(r.rank, r.handle, r.prompt, {"max_tokens": 16}) for r in load.requests], load.tokens_in, 16)
    loads = [np.array(found) for found in ranks.run(slot_load, few) if found is not None]
    timed = ranks.run(run_load, load)
    arrivals = [times for own in timed for times in own["arrivals"].values()]
    started = min(own["started"] for own in timed)
    seconds = max(times[-1] for times in arrivals) - started
    steps = [step for own in timed for step in own["full_steps"]]
    number = len(load.requests)
    return {
        "layout": layout,
        "requests": number,
        "tokens_in": load.tokens_in,
        "tokens_out": load.tokens_out,
        "ms_per_token": round(1e3 * statistics.median((t[-1] - t[0]) / (load.tokens_out - 1) for t in arrivals), 3),
        "vllm_ms_per_token": VLLM_MS.get(number),
        "step_ms": round(1e3 * statistics.median(steps), 3),
        "graph_ms": round(max(ranks.run(time_graph, few)), 3),
        "output_tokens_per_s": round(number * load.tokens_out / seconds),
        "ttft_ms": round(1e3 * statistics.median(times[0] - started for times in arrivals), 1),
        "active_experts": round(float((sum(loads) > 0).sum(1).mean()), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layouts", nargs="+", default=["bb:deepep", "ae:deepep"], help="roles by rank:plane")
    parser.add_argument("--requests", type=int, nargs="+", default=list(VLLM_MS))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="requests to profile decode steps of")
    arguments = parser.parse_args()
    command = f"python benchmarks/gpu/decode_two.py --out {arguments.out.name}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, gpu_ranks(2) as ranks:
        config = {**QWEN3_30B_A3B, "num_hidden_layers": arguments.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = {"path": folder, "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 4096}
        for layout in arguments.layouts:
            roles, _, backend = layout.partition(":")
            seqs = -(-max(arguments.requests) // sum(role in "ab" for role in roles))
            sizes = {"max_num_seqs": seqs, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "enable_prefix_caching": False}
            plane = PlaneConfig(backend, timeout_s=60.0)
            began = time.perf_counter()
            ranks.run(open_engine, EngineJob(roles, plane, model, sizes, max_num_tokens=MAX_BATCHED_TOKENS))
            print(f"{layout}: ready in {time.perf_counter() - began:.1f} s", flush=True)
            for requests in arguments.requests:
                load = draw(roles, requests, arguments.tokens_in, arguments.tokens_out)
                rows.append(measure_load(ranks, layout, load))
                print(json.dumps(rows[-1]), flush=True)
                measure.write(arguments.out, command, {}, rows)
            for requests in arguments.profile:
                kernels = ranks.run(profile, draw(roles, requests, arguments.tokens_in, 64))
                for rank, found in enumerate(kernels):
                    for row in found[:14]:
                        print(
                            f"{row['us_a_step']:10.1f} us {row['launches_a_step']:7.1f} x {row['kernel']}", flush=True
                        )
                    total = round(sum(row["us_a_step"] for row in found))
                    print(layout, requests, "rank", rank, "all kernels", total, "us a step", flush=True)
                name = f".{roles}{requests}.json"
                arguments.out.with_suffix(name).write_text(json.dumps(kernels, indent=1))
            ranks.run(close_engine)


if __name__ == "__main__":
    main()
