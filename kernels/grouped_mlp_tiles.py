"""Tile sizes of the grouped expert MLP, measured by ``benchmarks/gpu/kernels.py --sweep``; data, not code.

``rows`` is the mean number of rows a slot; a row of the table serves all means up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """One matrix product's tile: ``rows`` × ``columns`` of the output, ``depth`` of the sum at a time.

    ``weights_first``: the weights are the left operand, so that few rows do not waste the tensor cores, whose left
    operand has 64 rows at least. ``programs_per_sm`` 0 = one program a tile, else programs loop over tiles.
    ``bulk``: loads go through the bulk tensor copy engine, which needs rows that start at multiples of 16 bytes.
    ``is_paired``, with both: one load and one product serve ``columns`` of gate and as many of up.
    ``flattens``, of programs that loop: a tile's first loads are under way before the tile before it is stored.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    weights_first: bool = True
    programs_per_sm: int = 0
    bulk: bool = True
    is_paired: bool = False
    flattens: bool = False


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of both products for up to ``rows`` rows a slot in the mean.

    ``overlap``: the second product's programs start while the first one's last programs run.
    """

    rows: float
    gate_up: Tile
    down: Tile
    overlap: bool = True


ODD = Tile(rows=16, columns=64, depth=64, stages=2, warps=4, bulk=False)
"""For sizes that the bulk copy engine refuses, and for float32."""

_LARGE = Tile(128, 128, 64, 4, 8)
_LARGE_DOWN = Tile(128, 128, 64, 3, 4, weights_first=False, programs_per_sm=2, flattens=True)

HOPPER: tuple[Tiles, ...] = (
    Tiles(1, Tile(16, 64, 128, 3, 4), Tile(16, 128, 64, 4, 4)),
    Tiles(8, Tile(16, 64, 128, 3, 4), Tile(16, 128, 128, 3, 8)),
    Tiles(16, Tile(32, 64, 128, 3, 4, is_paired=True), Tile(32, 128, 64, 4, 4)),
    Tiles(32, Tile(64, 64, 128, 3, 4, is_paired=True), Tile(64, 128, 64, 4, 4)),
    Tiles(64, _LARGE, _LARGE_DOWN),
    Tiles(float("inf"), _LARGE, _LARGE_DOWN, overlap=False),
)
"""Of an H200."""


def tiles_for(mean_rows: float) -> Tiles:
    """The first row of the table that serves this mean number of rows a slot."""
    return next(tiles for tiles in HOPPER if mean_rows <= tiles.rows)


FP8: tuple[Tiles, ...] = (
    Tiles(8, Tile(16, 32, 128, 3, 4), Tile(16, 64, 128, 3, 4)),
    Tiles(32, Tile(32, 32, 128, 3, 4), Tile(32, 64, 128, 3, 4)),
    Tiles(float("inf"), Tile(128, 32, 128, 3, 4), Tile(128, 64, 128, 3, 4)),
)
"""Of ``grouped_mlp_fp8`` with rows in bfloat16: depth 128 is the block of a scale, gate and up are always paired."""

FP8_ROUNDED: tuple[Tiles, ...] = (
    Tiles(1, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 3, 4)),
    Tiles(8, Tile(16, 64, 128, 3, 4), Tile(16, 128, 128, 3, 4)),
    Tiles(32, Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 3, 4)),
    Tiles(float("inf"), Tile(128, 32, 128, 3, 4), Tile(128, 64, 128, 3, 4)),
)
"""The same with rows in float8."""


def fp8_tiles_for(mean_rows: float, rounds_rows: bool) -> Tiles:
    """As ``tiles_for``, of ``grouped_mlp_fp8``."""
    return next(tiles for tiles in (FP8_ROUNDED if rounds_rows else FP8) if mean_rows <= tiles.rows)
