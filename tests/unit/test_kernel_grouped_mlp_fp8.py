"""The grouped expert MLP with weights in float8, in the interpreter."""

from __future__ import annotations

import pytest

from expertmesh.kernels.grouped_mlp_tiles import FP8, FP8_ROUNDED, Tile, Tiles, fp8_tiles_for
from support.grouped_mlp_checks import check_grouped_mlp_fp8

# numpy, which the interpreter computes with, warns of rows that belong to nobody: they are all NaN.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:All-NaN slice encountered")]

SMALL = Tiles(1, Tile(16, 32, 128, 2, 4), Tile(16, 64, 128, 2, 4, programs_per_sm=1))
ROUNDS = pytest.mark.parametrize("rounds_rows", [False, True], ids=["rows in bfloat16", "rows in float8"])


@ROUNDS
@pytest.mark.parametrize("counts", [[3, 0, 17, 1], [0, 40, 0], [0, 0], [1]], ids=str)
def test_equals_the_reference(counts: list[int], rounds_rows: bool) -> None:
    check_grouped_mlp_fp8("cpu", counts, 256, 128, rounds_rows=rounds_rows, tiles=SMALL, spare=5)


@ROUNDS
def test_gaps_and_factors(rounds_rows: bool) -> None:
    check_grouped_mlp_fp8("cpu", [2, 0, 18], 128, 128, rounds_rows=rounds_rows, tiles=SMALL, gap=3, has_factors=True)


def test_blocks_at_the_edges_are_smaller() -> None:
    check_grouped_mlp_fp8("cpu", [5, 0, 18], 144, 80, rounds_rows=False, tiles=SMALL)


def test_the_tables_serve_every_number_of_rows() -> None:
    for table, rounds_rows in ((FP8, False), (FP8_ROUNDED, True)):
        assert [tiles.rows for tiles in table] == sorted(tiles.rows for tiles in table)
        assert fp8_tiles_for(0.01, rounds_rows) is table[0]
        assert fp8_tiles_for(1e9, rounds_rows) is table[-1]
