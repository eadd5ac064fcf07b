"""The grouped expert MLP with weights in float8: measured against its floor and the same with weights in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product

import torch
from grouped_mlp import SHAPES, Inputs, Shape, tile_words
from measure import Row, compile_all, compile_only, row, time_graph, time_graphs

from expertmesh.kernels import grouped_mlp_fp8
from expertmesh.kernels.grouped_mlp_fp8 import (
    Fp8Experts,
    grouped_expert_mlp_fp8,
    grouped_expert_mlp_fp8_reference,
    grouped_matmul_fp8,
    scale_shapes,
)
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.kernels.grouped_mlp_tiles import Tile

TOKENS = (8, 32, 64, 128, 256, 512, 1024, 4096)
_SETS = 2


def draw(shape: Shape) -> Fp8Experts:
    gate_up_scale, down_scale = (
        torch.rand(shape.experts, *scale, device="cuda") / depth**0.5
        for scale, depth in zip(scale_shapes(shape.hidden, shape.width), (shape.hidden, shape.width), strict=True)
    )
    gate_up = torch.empty(shape.experts, 2 * shape.width, shape.hidden, device="cuda", dtype=torch.float8_e4m3fn)
    down = torch.empty(shape.experts, shape.hidden, shape.width, device="cuda", dtype=torch.float8_e4m3fn)
    for weight in (gate_up, down):
        for expert in weight:
            expert.copy_(torch.randn(expert.shape, device="cuda"))
    return Fp8Experts(gate_up_AFH=gate_up, down_AHI=down, gate_up_scale_A2YX=gate_up_scale, down_scale_AXY=down_scale)


def measure(limits: dict[str, float]) -> Iterator[Row]:
    for shape in SHAPES:
        torch.cuda.empty_cache()
        inputs, experts = Inputs(shape), [draw(shape) for _ in range(_SETS)]
        for tokens in TOKENS:
            counts, rows = inputs.counts(tokens), inputs.rows(tokens, shape.hidden)
            active = sum(int((count > 0).sum()) for count in counts) / _SETS
            moved = active * 3 * shape.hidden * shape.width * (1 + 4 / 128**2)
            moved += 4 * tokens * shape.top_k * shape.hidden
            operations = 6 * tokens * shape.top_k * shape.hidden * shape.width
            calls = {
                rounds: [
                    partial(grouped_expert_mlp_fp8, rows[i], counts[i], experts[i], rounds_rows=rounds)
                    for i in range(_SETS)
                ]
                for rounds in (False, True)
            }
            floats = [partial(grouped_expert_mlp_gpu, rows[i], counts[i], inputs.gate_up[i], inputs.down[i])
                      for i in range(_SETS)]  # fmt: skip
            alternatives = {"rows in bfloat16": calls[False], "rows in float8": calls[True], "bfloat16": floats}
            times = time_graphs(alternatives, budget_ms=20, rounds=9)
            where = {**asdict(shape), "tokens": tokens, "active_experts": active}
            for rounds, name in ((False, "rows in bfloat16"), (True, "rows in float8")):
                unit = "fp8_matmul" if rounds else "bf16_matmul"
                result = row(f"grouped_mlp_fp8, {name}", where, times[name], num_bytes=moved, operations=operations,
                             limits=limits, unit=unit)  # fmt: skip
                yield {**result, "bfloat16_us": round(times["bfloat16"], 2)}


def candidates(mean_rows: float, *, is_gated: bool) -> list[Tile]:
    rows = next((rows for rows in (16, 32, 64) if rows >= mean_rows), 64)
    columns = (32, 64) if is_gated else (64, 128)
    found = [Tile(rows, c, 128, stages, 4) for c in columns for stages in (3, 4, 6)]
    found += [Tile(rows, columns[1], 128, stages, 8) for stages in (3, 4)]
    if mean_rows >= 48:
        found += [Tile(128, c, 128, stages, 8) for c in columns for stages in (3, 4)]
        found += [Tile(128, columns[1], 128, 3, 8, programs_per_sm=1)]
        found += [Tile(128, columns[0], 128, 3, 4)]
    return found


_SWEPT = ((SHAPES[0], 8), (SHAPES[0], 64), (SHAPES[0], 256), (SHAPES[0], 512), (SHAPES[0], 4096), (SHAPES[1], 64),
          (SHAPES[1], 4096))  # fmt: skip
Job = tuple[Shape, Tile, bool, bool]


def _compile(job: Job) -> None:
    shape, tile, gated, rounds = job
    depth, columns = (shape.hidden, shape.width) if gated else (shape.width, shape.hidden)
    weight = torch.empty(shape.experts, columns * (2 if gated else 1), depth, device="cuda", dtype=torch.float8_e4m3fn)
    scale = torch.empty(shape.experts, *scale_shapes(shape.hidden, shape.width)[0 if gated else 1], device="cuda")
    x, out = (torch.zeros(256, size, device="cuda", dtype=torch.bfloat16) for size in (depth, columns))
    counts = torch.empty(shape.experts, dtype=torch.int64, device="cuda")
    with compile_only(grouped_mlp_fp8, "_grouped_matmul_fp8_kernel"):
        grouped_matmul_fp8(x, counts, weight, scale, out, tile, is_gated=gated, rounds_rows=rounds)


def sweep(limits: dict[str, float]) -> Iterator[Row]:
    cases = [
        (shape, tokens, tile, gated, rounds)
        for (shape, tokens), gated, rounds in product(_SWEPT, (True, False), (False, True))
        for tile in candidates(tokens * shape.top_k / shape.experts, is_gated=gated)
    ]
    problems = compile_all(_compile, list({(case[0], *case[2:]) for case in cases}))
    state: tuple[Shape, Inputs, list[Fp8Experts]] | None = None
    for shape, tokens, tile, gated, rounds in cases:
        if problems[shape, tile, gated, rounds]:
            print("cannot compile", tile_words(tile), gated, rounds, problems[shape, tile, gated, rounds][:80])
            continue
        if state is None or state[0] != shape:
            state = None
            torch.cuda.empty_cache()
            state = (shape, Inputs(shape), [draw(shape) for _ in range(_SETS)])
        _, inputs, experts = state
        depth, columns = (shape.hidden, shape.width) if gated else (shape.width, shape.hidden)
        counts, x = inputs.counts(tokens), inputs.rows(tokens, depth)
        out = torch.empty(len(x[0]), columns, device="cuda", dtype=torch.bfloat16)
        weights = [(e.gate_up_AFH, e.gate_up_scale_A2YX) if gated else (e.down_AHI, e.down_scale_AXY) for e in experts]
        calls = [partial(grouped_matmul_fp8, x[i], counts[i], *weights[i], out, tile, is_gated=gated,
                         rounds_rows=rounds) for i in range(_SETS)]  # fmt: skip
        try:
            microseconds = time_graph(calls, budget_ms=4, rounds=3)
        except Exception as error:  # noqa: BLE001  # out of shared memory, say
            print("cannot run", tile_words(tile), repr(error)[:100])
            continue
        yield {"sweep": "fp8 gate_up" if gated else "fp8 down", **asdict(shape), "tokens": tokens,
               "rounds_rows": rounds, "us": round(microseconds, 2), "tile": tile_words(tile)}  # fmt: skip
    check(SHAPES[0])


def check(shape: Shape) -> None:
    """The table's tiles, at the sizes that are timed."""
    inputs, experts = Inputs(shape), draw(shape)
    for tokens in TOKENS[:6]:
        counts, rows = inputs.counts(tokens), inputs.rows(tokens, shape.hidden)
        for rounds in (False, True):
            actual = grouped_expert_mlp_fp8(rows[0], counts[0], experts, rounds_rows=rounds).float()
            expected = grouped_expert_mlp_fp8_reference(rows[0], counts[0], experts, rounds_rows=rounds).float()
            error = ((actual - expected).norm() / expected.norm()).item()
            print(f"fp8 MLP, {tokens} tokens, rounds_rows={rounds}: relative error {error:.1e}", flush=True)
            assert error < (8e-2 if rounds else 2e-2)
