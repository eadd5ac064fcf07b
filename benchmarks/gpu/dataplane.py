"""Dispatch and combine between two GPUs, in CUDA graphs: our planes, and DeepEP called directly.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/dataplane.py --out benchmarks/results/gpu_dataplane.json

A round trip is a dispatch and a combine without experts between them: what arrived goes back. ``deepep`` is our plane;
``direct`` the same buffer, settings and arguments in DeepEP's own calls; ``direct_capacity_t`` these with kernels made
for just so many tokens; ``fp8`` our plane with tokens that travel as float8 and become bfloat16 again; ``nccl`` our
other plane, which weights the rows itself.
All alternatives of a row are timed in turns, round by round; the figure is rank 0's median.

``--sweep`` times DeepEP with other numbers of multiprocessors instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from measure import Row

from expertmesh.mesh.dataplane.base import Exchange
from expertmesh.mesh.dataplane.deepep_checks import nccl_version
from expertmesh.mesh.dataplane.deepep_open import usable
from support.gpu_ranks import PlaneConfig, Rank, Ranks, close_planes, gpu_ranks, plane_of
from support.plane_checks import Batch, Layout, draw

TOKENS = (8, 64, 128, 512, 4096)
SHAPES = ((2048, 64), (7168, 128))  # hidden size, slots a rank
ROLES = {"ae": "asymmetric", "bb": "symmetric"}
TOP_K = 8
SWEPT_SMS = (8, 16, 24, 48, 64, 96, 132)
SWEPT_TOKENS = (8, 128, 4096)
PEER_BYTES = 395e9  # a second, one way, as a plain copy between the two GPUs was measured

_TRIPS = 10  # round trips in a graph
_ROUNDS = 15
_ROUND_S = 0.02
_TARGET = 1.05

Trip = Callable[[], object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--sweep", action="store_true", help="other numbers of multiprocessors")
    arguments = parser.parse_args()
    sweep = ["--sweep"] * arguments.sweep
    command = " ".join(["python benchmarks/gpu/dataplane.py", *sweep, "--out", arguments.out.name])
    rows: list[Row] = []
    with gpu_ranks(2) as ranks:
        versions = ranks.run(about)[0]
        for row in (sweeps if arguments.sweep else measured)(ranks):
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            write(arguments.out, {"command": command, **versions}, rows)
    return 0


def write(path: Path, head: Row, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(line) for line in rows)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def about(rank: Rank) -> Row:
    library = usable(Layout("bb", 64, 2048, TOP_K).shape(rank.rank), rank.device, ["node"] * rank.size)
    import deep_ep  # behind its checks, which also tell it where NCCL is

    return {
        **measure.machine(),
        "gpus": torch.cuda.device_count(),
        "deep_ep": deep_ep.__version__,
        "nccl": ".".join(str(part) for part in nccl_version(library)),
        "settings": {"top_k": TOP_K, "dtype": "bfloat16", "max_num_tokens": TOKENS[-1]},
        "peer_copy_bytes_per_s": PEER_BYTES,
    }


# -- what the ranks do ------------------------------------------------------------------------------------------------


def measured(ranks: Ranks) -> Iterator[Row]:
    for hidden, slots in SHAPES:
        for roles, name in ROLES.items():
            layout = Layout(roles, slots, hidden, TOP_K)
            for num_tokens in TOKENS:
                times = ranks.run(time_all, layout, num_tokens)[0]
                both_ways = 2 * num_tokens * hidden * torch.bfloat16.itemsize  # nearly every token visits the other GPU
                yield {
                    "layout": name,
                    "hidden": hidden,
                    "slots": slots,
                    "tokens": num_tokens,
                    "floor_us": round(both_ways / PEER_BYTES * 1e6, 1),
                    **{f"{key}_us": round(value, 2) for key, value in times.items()},
                    "over_direct": round(times["deepep"] / times["direct"], 3),
                    "within_target": times["deepep"] <= _TARGET * times["direct"],
                }
            ranks.run(close_planes)


def sweeps(ranks: Ranks) -> Iterator[Row]:
    for hidden, slots in SHAPES:
        for roles, name in ROLES.items():
            layout = Layout(roles, slots, hidden, TOP_K)
            for num_tokens in SWEPT_TOKENS:
                times = ranks.run(time_sms, layout, num_tokens)[0]
                yield {"layout": name, "hidden": hidden, "slots": slots, "tokens": num_tokens} | {
                    f"sms_{key}_us": round(value, 2) for key, value in times.items()
                }
            ranks.run(close_planes)


def time_all(rank: Rank, layout: Layout, num_tokens: int) -> dict[str, float]:
    tokens = layout.tokens(num_tokens, num_tokens)
    batch = draw(layout, tokens[rank.rank], rank.rank, rank.device, "any")
    config = PlaneConfig("deepep")
    plane = plane_of(rank, config, layout.shape(rank.rank))
    capacity = plane._capacity(num_tokens)
    num_sms = plane._settings.sms_for(capacity)
    fp8 = plane_of(rank, replace(config, fp8_dispatch=True), layout.shape(rank.rank))
    nccl = plane_of(rank, replace(config, backend="nccl"), layout.shape(rank.rank))
    return in_turns(
        num_tokens,
        {
            "deepep": trip(plane, batch, tokens),
            "direct": direct(plane, batch, layout, capacity, num_sms),
            "direct_capacity_t": direct(plane, batch, layout, num_tokens, num_sms),
            "fp8": trip(fp8, batch, tokens),
            "nccl": trip(nccl, batch, tokens),
        },
    )


def time_sms(rank: Rank, layout: Layout, num_tokens: int) -> dict[str, float]:
    tokens = layout.tokens(num_tokens, num_tokens)
    batch = draw(layout, tokens[rank.rank], rank.rank, rank.device, "any")
    plane = plane_of(rank, PlaneConfig("deepep"), layout.shape(rank.rank))
    capacity = plane._capacity(num_tokens)
    return in_turns(num_tokens, {str(sms): direct(plane, batch, layout, capacity, sms) for sms in SWEPT_SMS})


def trip(plane: Any, batch: Batch, tokens: list[int]) -> Trip:
    """A round trip through a plane."""
    exchange = Exchange(layer=0, version=1, tokens=tokens, capacity=max(tokens))

    def call() -> object:
        arrived = plane.dispatch(batch.x_TH, batch.slot_TK, batch.weight_TK, exchange).wait()
        return plane.combine(arrived.rows_NH, arrived.handle).wait()

    return call


def direct(plane: Any, batch: Batch, layout: Layout, capacity: int, num_sms: int) -> Trip:
    """The same round trip in DeepEP's own calls; its group has the expert ranks first, so that slots are ids."""
    buffer, num_ids = plane._buffer, len(layout.roles) * layout.slots_per_rank

    def call() -> object:
        rows_NH, _, _, handle, _ = buffer.dispatch(
            batch.x_TH,
            topk_idx=batch.slot_TK,
            topk_weights=batch.weight_TK,
            num_experts=num_ids,
            num_max_tokens_per_rank=capacity,
            expert_alignment=1,
            num_sms=num_sms,
            do_handle_copy=False,
            do_cpu_sync=False,
            do_expand=True,
        )
        return buffer.combine(rows_NH, handle)[0]

    return call


def in_turns(num_tokens: int, alternatives: dict[str, Trip]) -> dict[str, float]:
    """Median time of one round trip of each alternative in µs. Every rank does the same number of everything."""
    graphs = {name: captured(call) for name, call in alternatives.items()}
    replays = max(2, round(_ROUND_S / (_TRIPS * (25e-6 + num_tokens * 0.1e-6))))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(_ROUNDS):
        names = list(graphs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            graph = graphs[name]
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            graph.replay()  # meets the other rank
            start.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / (replays * _TRIPS))
    return {name: statistics.median(found) for name, found in times.items()}


def captured(call: Trip) -> torch.cuda.CUDAGraph:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_TRIPS):
            call()
    return graph


if __name__ == "__main__":
    raise SystemExit(main())
