"""The grouped expert MLP: measured against its floor and torch's grouped_mm; ``sweep`` finds the tiles.

Tokens choose K of the experts uniformly, without repetition. What must move: the weights of the experts that got rows,
read once, and the rows, read and written once. Several sets of weights and rows take turns, so that nothing is found in
the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from measure import Row, compile_all, compile_only, row, time_graph, time_graphs

from expertmesh.kernels import grouped_mlp_gpu
from expertmesh.kernels.grouped_mlp import library_expert_mlp
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu, grouped_matmul
from expertmesh.kernels.grouped_mlp_tiles import Tile, Tiles, tiles_for

Mlp = Callable[..., torch.Tensor]

TOKENS = (8, 32, 64, 128, 256, 512, 1024, 4096)
_SETS = 2
_TOLERANCE = 2e-2
_COMPILED_TOKENS = 128  # any number


@dataclass(frozen=True)
class Shape:
    experts: int
    top_k: int
    hidden: int
    width: int


SHAPES = (Shape(128, 8, 2048, 768), Shape(32, 8, 7168, 2048))


class Inputs:
    """Weights of a shape, drawn once, and rows and counts for numbers of tokens."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.gate_up = [self._weights(2 * shape.width, shape.hidden) for _ in range(_SETS)]
        self.down = [self._weights(shape.hidden, shape.width) for _ in range(_SETS)]

    def _weights(self, columns: int, depth: int) -> torch.Tensor:
        weights = torch.empty(self.shape.experts, columns, depth, device="cuda", dtype=torch.bfloat16)
        return weights.normal_(std=depth**-0.5)

    def counts(self, tokens: int) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(tokens)
        shape, counts = self.shape, []
        for _ in range(_SETS):
            chosen = torch.rand(tokens, shape.experts, generator=generator, device="cuda").topk(shape.top_k).indices
            counts.append(torch.bincount(chosen.flatten(), minlength=shape.experts))
        return counts

    def rows(self, tokens: int, columns: int) -> list[torch.Tensor]:
        num_rows = tokens * self.shape.top_k
        return [torch.randn(num_rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(_SETS)]


def measure(shapes: tuple[Shape, ...], limits: dict[str, float]) -> Iterator[Row]:
    """The function with its table, the same with the other choice of overlap, and the library's."""
    for shape in shapes:
        torch.cuda.empty_cache()
        inputs = Inputs(shape)
        for tokens in TOKENS:
            counts, rows = inputs.counts(tokens), inputs.rows(tokens, shape.hidden)
            active = sum(int((count > 0).sum()) for count in counts) / _SETS
            num_bytes = (active * 3 * shape.hidden * shape.width + 2 * tokens * shape.top_k * shape.hidden) * 2
            operations = 6 * tokens * shape.top_k * shape.hidden * shape.width
            functions = _functions(tiles_for(tokens * shape.top_k / shape.experts))
            calls = {name: _calls(function, inputs, rows, counts) for name, function in functions.items()}
            where = {**asdict(shape), "tokens": tokens, "active_experts": active}
            for name, microseconds in time_graphs(calls, budget_ms=20, rounds=9).items():
                yield row(name, where, microseconds, num_bytes=num_bytes, operations=operations, limits=limits)


def _functions(tiles: Tiles) -> dict[str, Mlp]:
    found: dict[str, Mlp] = {"grouped_mlp": grouped_expert_mlp_gpu, "grouped_mm of torch": library_expert_mlp}
    other = replace(tiles, overlap=not tiles.overlap)
    found["grouped_mlp, overlap " + ("on" if other.overlap else "off")] = partial(grouped_expert_mlp_gpu, tiles=other)
    return found


def _calls(
    function: Mlp, inputs: Inputs, rows: list[torch.Tensor], counts: list[torch.Tensor]
) -> list[Callable[[], torch.Tensor]]:
    return [partial(function, rows[i], counts[i], inputs.gate_up[i], inputs.down[i]) for i in range(_SETS)]


def candidates(mean_rows: float, *, is_gated: bool) -> list[Tile]:
    """Tiles worth a try at this mean number of rows a slot: what a first, wider sweep left over, and more."""
    fitting = [rows for rows in (16, 32, 64, 128) if rows >= mean_rows] or [128]
    found: list[Tile] = []
    for rows in fitting[:2]:
        sizes = _GATED_SIZES if is_gated else _DOWN_SIZES
        found += [Tile(rows, *size) for size in sizes if rows < 128 or size[1] == 64]
        if is_gated:
            found += [Tile(rows, *size, is_paired=True) for size in _PAIRED_SIZES if rows < 64 or size[1] < 256]
    if mean_rows >= 24:
        found += [Tile(*size, weights_first=False) for size in (_GATED_ROWS_FIRST if is_gated else _DOWN_ROWS_FIRST)]
    if mean_rows >= 48:
        found += [replace(tile, programs_per_sm=1) for tile in found if tile.warps == 8]
        found += [replace(tile, flattens=True) for tile in found if tile.programs_per_sm]
        found += [Tile(*size, programs_per_sm=2, flattens=flattens, weights_first=False)
                  for size in _TWO_A_MULTIPROCESSOR for flattens in (False, True)]  # fmt: skip
    return found


# columns, depth, stages, warps
_GATED_SIZES = ((64, 128, 2, 4), (64, 128, 3, 4), (64, 128, 4, 4), (64, 256, 3, 4), (128, 128, 3, 8), (128, 64, 4, 8),
                (64, 64, 6, 4), (128, 64, 3, 4))  # fmt: skip
_PAIRED_SIZES = ((32, 128, 4, 4), (32, 128, 6, 4), (32, 256, 3, 4), (32, 256, 4, 4), (64, 128, 3, 4), (64, 128, 4, 4),
                 (128, 64, 4, 8))  # fmt: skip
_DOWN_SIZES = ((64, 128, 4, 4), (64, 256, 3, 4), (64, 128, 6, 4), (128, 128, 2, 4), (128, 128, 3, 4), (128, 128, 3, 8),
               (128, 128, 5, 4), (128, 64, 4, 4), (128, 64, 6, 4), (256, 64, 4, 8))  # fmt: skip
# rows, columns, depth, stages, warps
_GATED_ROWS_FIRST = ((64, 128, 64, 4, 4), (128, 128, 64, 3, 8), (128, 128, 64, 4, 8))
_TWO_A_MULTIPROCESSOR = ((128, 128, 64, 3, 4),)
_DOWN_ROWS_FIRST = ((64, 128, 64, 4, 4), (128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (128, 128, 64, 4, 8))


def _compile(job: tuple[Shape, int, Tile, bool]) -> None:
    shape, tokens, tile, is_gated = job
    x, weight, out = _operands(shape, tokens, is_gated)
    counts = torch.empty(shape.experts, dtype=torch.int64, device="cuda")
    with compile_only(grouped_mlp_gpu, "_grouped_matmul_kernel"):
        grouped_matmul(x, counts, weight, out, tile, is_gated=is_gated)


def _operands(shape: Shape, tokens: int, is_gated: bool) -> tuple[torch.Tensor, ...]:
    """Uninitialised tensors of the right shapes."""
    num_rows = tokens * shape.top_k
    depth, columns = (shape.hidden, shape.width) if is_gated else (shape.width, shape.hidden)
    make = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.empty(shape.experts, columns * (2 if is_gated else 1), depth, **make)
    return torch.empty(num_rows, depth, **make), weight, torch.empty(num_rows, columns, **make)


def sweep(limits: dict[str, float]) -> Iterator[Row]:
    """Every candidate of both products, alone; then the best of both together, with and without overlap."""
    kinds: dict[tuple[Shape, Tile, bool], tuple[Shape, int, Tile, bool]]
    kinds = {(shape, tile, gated): (shape, _COMPILED_TOKENS, tile, gated) for shape in SHAPES for tokens in TOKENS
             for gated in (True, False)
             for tile in candidates(tokens * shape.top_k / shape.experts, is_gated=gated)}  # fmt: skip
    problems = {(job[0], job[2], job[3]): text for job, text in compile_all(_compile, list(kinds.values())).items()}
    for (shape, tile, gated), text in problems.items():
        if text:
            print("cannot compile", shape, tile, gated, text)
    for shape in SHAPES:
        torch.cuda.empty_cache()
        inputs = Inputs(shape)
        for tokens in TOKENS:
            best: dict[bool, tuple[float, Tile]] = {}
            for gated in (True, False):
                tiles = candidates(tokens * shape.top_k / shape.experts, is_gated=gated)
                for microseconds, tile in _time_tiles(
                    inputs, tokens, gated, [tile for tile in tiles if not problems[shape, tile, gated]]
                ):
                    best[gated] = min(best.get(gated, (float("inf"), tile)), (microseconds, tile), key=lambda b: b[0])
                    yield {"sweep": "gate_up" if gated else "down", **asdict(shape), "tokens": tokens,
                           "us": round(microseconds, 2), "tile": tile_words(tile)}  # fmt: skip
            yield from _time_together(inputs, tokens, best[True][1], best[False][1])


def tile_words(tile: Tile) -> str:
    return (
        f"{tile.rows}x{tile.columns}x{tile.depth} s{tile.stages} w{tile.warps}"
        f"{' weights' if tile.weights_first else ' rows'} p{tile.programs_per_sm}"
        f"{'' if tile.bulk else ' pointers'}{' paired' if tile.is_paired else ''}{' flat' if tile.flattens else ''}"
    )


def _time_tiles(inputs: Inputs, tokens: int, gated: bool, tiles: list[Tile]) -> Iterator[tuple[float, Tile]]:
    shape = inputs.shape
    weights = inputs.gate_up if gated else inputs.down
    counts = inputs.counts(tokens)
    x = inputs.rows(tokens, shape.hidden if gated else shape.width)
    out = [torch.empty(len(x[0]), shape.width if gated else shape.hidden, device="cuda", dtype=torch.bfloat16)
           for _ in range(_SETS)]  # fmt: skip
    expected = torch.nn.functional.grouped_mm(
        x[0], weights[0].transpose(1, 2), offs=counts[0].cumsum(0, dtype=torch.int32)
    )
    if gated:
        gate, up = expected.float().chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
    for tile in tiles:
        calls = [
            partial(grouped_matmul, x[i], counts[i], weights[i], out[i], tile, is_gated=gated) for i in range(_SETS)
        ]
        try:
            out[0].fill_(float("nan"))
            microseconds = time_graph(calls, budget_ms=6, rounds=5)
        except Exception as error:  # noqa: BLE001  # out of shared memory, say
            print("cannot run", tile_words(tile), repr(error)[:120])
            continue
        error = ((out[0].float() - expected.float()).norm() / expected.float().norm()).item()
        if not error < _TOLERANCE:
            print("WRONG", shape, tokens, gated, tile_words(tile), error)
            continue
        yield microseconds, tile


def _time_together(inputs: Inputs, tokens: int, gate_up: Tile, down: Tile) -> Iterator[Row]:
    counts, rows = inputs.counts(tokens), inputs.rows(tokens, inputs.shape.hidden)
    cases: dict[str, Mlp] = {"grouped_mm": library_expert_mlp}
    for overlap in (False, True):
        tiles = Tiles(float("inf"), gate_up, down, overlap=overlap)
        cases[f"overlap={overlap}"] = partial(grouped_expert_mlp_gpu, tiles=tiles)
    timed = time_graphs({name: _calls(function, inputs, rows, counts) for name, function in cases.items()})
    for name, microseconds in timed.items():
        yield {"sweep": "both", **asdict(inputs.shape), "tokens": tokens, "us": round(microseconds, 2),
               "case": name, "tile": f"{tile_words(gate_up)} | {tile_words(down)}"}  # fmt: skip
