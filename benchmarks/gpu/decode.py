"""Decoding on one GPU: a ``both`` rank with random weights of Qwen3-30B-A3B's shape, through the real engine.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/decode.py --out benchmarks/results/gpu_decode.json

Every number of requests is submitted at once, 128 random tokens in, 128 out, greedy, no cached prefixes. Scheduler,
engine, step loop, lockstep, slots and data plane are those that serve; only gRPC is missing. Time per output token is a
request's time from its first token to its last over the tokens between, so the prompts of others that are computed
meanwhile count. ``step_ms`` is the median between two steps' tokens on the host while all requests decode, ``graph_ms``
what the device takes for such a step's graph alone, replayed back to back: the difference is what the host costs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.spec import load_spec
from expertmesh.mesh.model.weights import DummyCheckpoint
from expertmesh.mesh.padding import PaddedStep, round_up
from support.engine_driver import TimedDriver
from support.solo_rank import SoloRank

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
VLLM_MS = {128: {1: 4.12, 8: 9.13, 32: 15.8, 64: 17.5, 128: 18.6, 256: 21.6}, 1024: {64: 19.3, 256: 27.2}}
"""vLLM 0.26.0, the same model shape and load on an H200 (torch 2.11, FA3, Triton fused MoE): tokens in, requests,
median ms per token."""
CHUNK, LEAST_CHUNK = 8192, 1024
_REPLAYS = 20


class Timed(TimedDriver, SoloRank):
    """A rank of its own, which notes when tokens reach the host."""


def build(arguments: argparse.Namespace) -> Timed:
    with tempfile.TemporaryDirectory() as folder:
        config = {**QWEN3_30B_A3B, "num_hidden_layers": arguments.layers}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = ModelConfig(path=Path(folder), dtype="bfloat16", load_format="dummy", max_model_len=4096)
        spec = load_spec(model)
    return Timed(
        spec,
        DummyCheckpoint(torch.device("cuda")),
        "cuda",
        max_num_seqs=max([256, *arguments.requests]),
        max_num_batched_tokens=max(arguments.chunk),
        fp8=arguments.fp8,
        enable_prefix_caching=False,
    )


def submit(rank: Timed, requests: int, tokens_in: int, tokens_out: int) -> None:
    prompts = np.random.default_rng(requests).integers(0, rank.spec.vocab_size, (requests, tokens_in))
    for handle, prompt in enumerate(prompts.tolist()):
        rank.submit(handle, prompt, max_tokens=tokens_out)


def set_chunk(rank: Timed, tokens: int) -> None:
    """Steps of at most so many tokens from now on; no more than the rank was made for."""
    scheduler = rank.half.engine._scheduler
    scheduler._limits = replace(scheduler._limits, max_num_batched_tokens=tokens)


def measure_requests(rank: Timed, requests: int, tokens_in: int, tokens_out: int, chunk: int) -> dict[str, Any]:
    rank.reset()
    set_chunk(rank, chunk)
    submit(rank, requests, tokens_in, tokens_out)
    started, active = time.perf_counter(), 0.0
    while rank.step():
        if not active and rank.landings and rank.landings[-1][1] == requests:
            torch.cuda.synchronize()
            active = active_experts(rank)
    seconds = time.perf_counter() - started
    assert all(len(times) == tokens_out for times in rank.arrivals.values())
    prefilled = max(times[0] for times in rank.arrivals.values()) - started
    per_token = [(times[-1] - times[0]) / (tokens_out - 1) for times in rank.arrivals.values()]
    full = [now for now, number in rank.landings if number == requests]
    row = {
        "requests": requests,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "ms_per_token": round(1e3 * statistics.median(per_token), 3),
        "vllm_ms_per_token": VLLM_MS.get(tokens_in, {}).get(requests),
        "step_ms": round(1e3 * statistics.median(np.diff(full)), 3) if len(full) > 1 else None,
        "output_tokens_per_s": round(requests * tokens_out / seconds),
        "prefill_tokens_per_s": round(requests * tokens_in / prefilled),
        "ttft_ms": round(1e3 * statistics.median(times[0] - started for times in rank.arrivals.values()), 1),
        "active_experts": round(active, 1),
    }
    return {**row, "graph_ms": round(time_graph(rank, requests, tokens_in, chunk), 3)}


def active_experts(rank: Timed) -> float:
    """Slots a layer that the last step sent rows to."""
    counts = [(counts_S > 0).sum() for counts_S in rank.plane.counts.values()]
    return torch.stack(counts).float().mean().item()


def time_graph(rank: Timed, requests: int, tokens_in: int, chunk: int) -> float:
    """Milliseconds of a decode step's graph, replayed over and over while all requests decode.

    What is generated means nothing afterwards: a replay takes for input what the one before it chose.
    """
    assert rank.graphs is not None, "there is a GPU"
    rank.reset()
    # So many that the first request still decodes when the last one's prompt is computed.
    submit(rank, requests, tokens_in, 8 + requests * tokens_in // (chunk - requests))
    while not rank.landings or rank.landings[-1][1] < requests:
        assert rank.step(), "all requests decode at some time"
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(_REPLAYS):
        rank.graphs.replay(PaddedStep(round_up(requests)))
    end.record()
    end.synchronize()
    rank.run()
    return start.elapsed_time(end) / _REPLAYS


def profile(rank: Timed, requests: int, tokens_in: int, phase: str) -> list[dict[str, Any]]:
    """What the kernels of a step take, summed up by name: of ``decode``, of the first step (``prefill``), or of steps
    that compute prompts while half of the requests decode (``mixed``)."""
    steps = {"decode": 8, "prefill": 1, "mixed": 4}[phase]
    rank.reset()
    submit(rank, requests, tokens_in, 40)
    while (phase == "decode" and len(rank.landings) < 16) or (phase == "mixed" and len(rank.arrivals) < requests // 2):
        rank.step()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            rank.step()
        torch.cuda.synchronize()
    print(f"{phase}: {1e3 * (time.perf_counter() - began) / steps:.1f} ms a step by the host's clock", flush=True)
    rank.run()
    found = [event for event in profiler.key_averages() if event.self_device_time_total]
    found.sort(key=lambda event: -event.self_device_time_total)
    return [
        {
            "requests": requests,
            "kernel": event.key[:90],
            "launches_a_step": round(event.count / steps, 1),
            "us_a_step": round(event.self_device_time_total / steps, 1),
        }
        for event in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--tokens-in", type=int, nargs="+", default=list(VLLM_MS))
    parser.add_argument("--requests", type=int, nargs="*", default=[], help="default: what the table has")
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--chunk", type=int, nargs="+", default=[CHUNK], help="tokens of a step, at most; in turn")
    parser.add_argument("--fp8", choices=("off", "weights", "activations"), default="off", help="as expert.fp8")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="requests to profile decode steps of")
    parser.add_argument("--profile-prefill", type=int, nargs="*", default=[], help="requests to profile prefill of")
    parser.add_argument("--profile-mixed", type=int, nargs="*", default=[], help="requests to profile both at once of")
    arguments = parser.parse_args()
    assert min(arguments.chunk) >= LEAST_CHUNK, f"--chunk below {LEAST_CHUNK}"
    began = time.perf_counter()
    rank = build(arguments)
    print(f"built in {time.perf_counter() - began:.1f} s, {rank.load.num_kv_blocks} KV blocks", flush=True)
    rows: list[dict[str, Any]] = []
    for tokens_in in arguments.tokens_in:
        for requests in arguments.requests or VLLM_MS[tokens_in]:
            rank.reset()
            submit(rank, requests, tokens_in, 4)
            rank.run()  # compiles what prefill needs
            active_experts(rank)
            for chunk in arguments.chunk:
                row = measure_requests(rank, requests, tokens_in, arguments.tokens_out, chunk)
                rows.append({**row, "chunk": chunk, "fp8": arguments.fp8})
                print(json.dumps(rows[-1]), flush=True)
                measure.write(arguments.out, {}, rows)
    set_chunk(rank, max(arguments.chunk))
    profiled = {"decode": arguments.profile, "prefill": arguments.profile_prefill, "mixed": arguments.profile_mixed}
    for phase, numbers in profiled.items():
        for requests in numbers:
            kernels = profile(rank, requests, arguments.tokens_in[0], phase)
            name = f"{phase}{requests}"
            for row in kernels[:16]:
                print(f"{row['us_a_step']:10.1f} us {row['launches_a_step']:7.1f} x {row['kernel']}", flush=True)
            print(name, "all kernels", round(sum(row["us_a_step"] for row in kernels)), "us a step", flush=True)
            arguments.out.with_suffix(f".{name}.json").write_text(json.dumps(kernels, indent=1))


if __name__ == "__main__":
    main()
