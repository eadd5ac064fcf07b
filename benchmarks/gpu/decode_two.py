"""Decoding on two GPUs, colocated and apart: random weights of Qwen3-30B-A3B's shape, through the real engine.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/decode_two.py --out benchmarks/results/gpu_decode_two.json

``bb`` = two ranks with both halves, half of the requests and of the experts each; ``ae`` = one rank with the attention
half and all requests, one with all experts. ``--micro-batches 1 2`` compares steps as one batch and as two in turns:
``hidden`` is the share of the time of exchange kernels, by rank, in which other kernels ran on that GPU too. As
``decode.py`` otherwise, whose docstring says what the columns mean: all requests submitted at once, 128 random tokens
in, 128 out, greedy, no cached prefixes, everything but gRPC.
"""

from __future__ import annotations

import argparse
import itertools
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

from expertmesh.mesh.padding import PaddedStep, round_up
from support.gpu_engines import EngineJob, Request, TimedEngine, close_engine, open_engine, submit
from support.gpu_ranks import PlaneConfig, Rank, Ranks, gpu_ranks
from support.kernel_overlap import KernelTime, hidden

VLLM_MS = {64: 10.8, 256: 14.4, 512: 18.2}
"""vLLM 0.26.0 on two H200s, its best mode offline (tensor parallel attention, expert parallel experts): median ms per
token, the same model shape and load."""
MAX_BATCHED_TOKENS = 8192
_REPLAYS = 20
_PROFILED_STEPS = 8
_PROFILED_PROMPT_STEPS = 1


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


def time_graph(rank: Rank, job: tuple[Load, int]) -> float:
    """Milliseconds of a decode step's graph, replayed on all ranks over and over while all requests decode."""
    load, micro_batches = job
    engine = begin(rank, load)
    for _ in range(load.steps_until_all_decode):
        engine.step()
    assert engine.graphs is not None, "there is a GPU"
    most = max(load.of(Rank(peer, rank.size, rank.store, rank.device)) for peer in range(rank.size))
    parts = min(micro_batches, most)
    step = PaddedStep(round_up(-(-most // parts)), parts)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    engine.graphs.replay(step)
    start.record()
    for _ in range(_REPLAYS):
        engine.graphs.replay(step)
    end.record()
    end.synchronize()
    engine.run()
    return start.elapsed_time(end) / _REPLAYS


def profile(rank: Rank, job: tuple[Load, bool]) -> list[dict[str, Any]]:
    """What the kernels of a decode step, or of the first steps, with prompts, take on this rank, summed up by name."""
    load, prompts = job
    profiler = profiled(rank, load, prompts=prompts)
    found = [event for event in profiler.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    steps = _PROFILED_PROMPT_STEPS if prompts else _PROFILED_STEPS
    return [
        {
            "kernel": event.key[:90],
            "launches_a_step": round(event.count / steps, 1),
            "us_a_step": round(event.self_device_time_total / steps, 1),
        }
        for event in found
    ]


def exchange_times(rank: Rank, load: Load) -> tuple[float, float, list[str]]:
    """µs a decode step in which exchange kernels run on this rank, those in which others run too, and their names."""
    kernels = [
        KernelTime(event.name, event.time_range.start, event.time_range.end)
        for event in profiled(rank, load).events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    exchange_us, hidden_us = hidden(kernels)
    names = sorted({kernel.name[:60] for kernel in kernels if kernel.is_exchange})
    return exchange_us / _PROFILED_STEPS, hidden_us / _PROFILED_STEPS, names


def profiled(rank: Rank, load: Load, *, prompts: bool = False) -> Any:
    """Some decode steps, or steps with ``prompts``, under torch's profiler."""
    engine = begin(rank, load)
    for _ in range(0 if prompts else load.steps_until_all_decode + 8):
        engine.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_PROFILED_PROMPT_STEPS if prompts else _PROFILED_STEPS):
            engine.step()
        torch.cuda.synchronize()
    engine.run()
    return profiler


def measure_overlap(ranks: Ranks, load: Load) -> dict[str, Any]:
    """By rank."""
    found = ranks.run(exchange_times, load)
    return {
        "exchange_us": [round(exchange_us, 1) for exchange_us, _, _ in found],
        "hidden": [round(hidden_us / exchange_us, 3) if exchange_us else None for exchange_us, hidden_us, _ in found],
        "exchange_kernels": sorted({name for _, _, names in found for name in names}),
    }


def measure_load(ranks: Ranks, layout: str, load: Load, micro_batches: int) -> dict[str, Any]:
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
        "micro_batches": micro_batches,
        "requests": number,
        "tokens_in": load.tokens_in,
        "tokens_out": load.tokens_out,
        "ms_per_token": round(1e3 * statistics.median((t[-1] - t[0]) / (load.tokens_out - 1) for t in arrivals), 3),
        "vllm_ms_per_token": VLLM_MS.get(number),
        "step_ms": round(1e3 * statistics.median(steps), 3),
        "graph_ms": round(max(ranks.run(time_graph, (few, micro_batches))), 3),
        "output_tokens_per_s": round(number * load.tokens_out / seconds),
        "ttft_ms": round(1e3 * statistics.median(times[0] - started for times in arrivals), 1),
        "active_experts": round(float((sum(loads) > 0).sum(1).mean()), 1),
    }


def note_profile(out: Path, name: str, kernels: list[list[dict[str, Any]]]) -> None:
    """``kernels`` by rank."""
    for rank, found in enumerate(kernels):
        for line in found[:16]:
            print(f"{line['us_a_step']:10.1f} us {line['launches_a_step']:7.1f} x {line['kernel']}", flush=True)
        total = round(sum(line["us_a_step"] for line in found))
        print(name, "rank", rank, "all kernels", total, "us a step", flush=True)
    out.with_suffix(f".{name}.json").write_text(json.dumps(kernels, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layouts", nargs="+", default=["bb:deepep", "ae:deepep"], help="roles by rank:plane")
    parser.add_argument("--requests", type=int, nargs="+", default=list(VLLM_MS))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--micro-batches", type=int, nargs="+", choices=(1, 2), default=[1])
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="requests to profile decode steps of")
    parser.add_argument("--profile-prefill", type=int, nargs="*", default=[], help="requests to profile prefill of")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, gpu_ranks(2) as ranks:
        config = {**QWEN3_30B_A3B, "num_hidden_layers": arguments.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = {"path": folder, "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 4096}
        for layout, micro_batches in itertools.product(arguments.layouts, arguments.micro_batches):
            roles, _, backend = layout.partition(":")
            seqs = -(-max(arguments.requests) // sum(role in "ab" for role in roles))
            sizes = {"max_num_seqs": seqs, "max_num_batched_tokens": MAX_BATCHED_TOKENS, "enable_prefix_caching": False}
            plane = PlaneConfig(backend, timeout_s=60.0)
            began = time.perf_counter()
            job = EngineJob(roles, plane, model, sizes, max_num_tokens=MAX_BATCHED_TOKENS, micro_batches=micro_batches)
            ranks.run(open_engine, job)
            print(f"{layout}: ready in {time.perf_counter() - began:.1f} s", flush=True)
            for requests in arguments.requests:
                load = draw(roles, requests, arguments.tokens_in, arguments.tokens_out)
                row = measure_load(ranks, layout, load, micro_batches)
                if len(arguments.micro_batches) > 1:
                    row |= measure_overlap(ranks, draw(roles, requests, arguments.tokens_in, 64))
                rows.append(row)
                print(json.dumps(rows[-1]), flush=True)
                measure.write(arguments.out, {}, rows)
            jobs = [(requests, False) for requests in arguments.profile]
            for requests, prompts in jobs + [(requests, True) for requests in arguments.profile_prefill]:
                load = draw(roles, requests, arguments.tokens_in, 64)
                part = f"{roles}{requests}" + (f".m{micro_batches}" if micro_batches > 1 else "")
                note_profile(arguments.out, part + ".prefill" * prompts, ranks.run(profile, (load, prompts)))
            ranks.run(close_engine)


if __name__ == "__main__":
    main()
