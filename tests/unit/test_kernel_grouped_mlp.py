"""The grouped expert MLP's Triton kernels, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.grouped_mlp_tiles import HOPPER, Tile, Tiles, tiles_for
from support.grouped_mlp_checks import check_grouped_mlp

pytestmark = pytest.mark.slow

WEIGHTS_FIRST = Tile(rows=16, columns=32, depth=32, stages=2, warps=4)
ROWS_FIRST = Tile(rows=32, columns=16, depth=64, stages=2, warps=4, weights_first=False)
LOOPING = Tile(rows=16, columns=16, depth=32, stages=2, warps=4, programs_per_sm=1)
PAIRED = Tile(rows=16, columns=32, depth=32, stages=2, warps=4, is_paired=True)
POINTERS = Tile(rows=16, columns=32, depth=32, stages=2, warps=4, bulk=False)
TILES = {
    name: Tiles(1, tile, tile)
    for name, tile in {
        "weights first": WEIGHTS_FIRST,
        "rows first": ROWS_FIRST,
        "looping": LOOPING,
        "pointers": POINTERS,
        "paired": PAIRED,
    }.items()
}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES.keys())
@pytest.mark.parametrize("counts", [[3, 0, 17, 1], [0, 40, 0], [0, 0, 0]], ids=str)
def test_every_kind_of_tile(counts: list[int], tiles: Tiles) -> None:
    check_grouped_mlp("cpu", counts, 64, 40, torch.bfloat16, tiles=tiles, spare=5)


@pytest.mark.parametrize("counts", [[0], [1], [1, 0, 0], [0, 0, 1], [33, 1, 40, 0, 2]], ids=str)
@pytest.mark.parametrize(("hidden", "width"), [(33, 7), (64, 24)])
def test_float32_and_odd_sizes(counts: list[int], hidden: int, width: int) -> None:
    check_grouped_mlp("cpu", counts, hidden, width, torch.float32)


def test_odd_sizes_in_bfloat16() -> None:
    check_grouped_mlp("cpu", [5, 0, 18], 33, 7, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaps_between_slots(dtype: torch.dtype) -> None:
    check_grouped_mlp("cpu", [3, 0, 17, 1], 64, 24, dtype, tiles=TILES["weights first"], gap=7)


@pytest.mark.parametrize("name", ["weights first", "rows first", "pointers"])
def test_rows_are_multiplied_by_their_factors(name: str) -> None:
    check_grouped_mlp("cpu", [3, 0, 17, 1], 64, 24, torch.bfloat16, tiles=TILES[name], gap=2, has_factors=True)


def test_no_rows_at_all() -> None:
    check_grouped_mlp("cpu", [0, 0], 64, 24, torch.bfloat16)


def test_a_slot_with_more_blocks_than_a_group_of_neighbours() -> None:
    check_grouped_mlp("cpu", [2, 16 * 18, 3], 32, 32, torch.bfloat16, tiles=TILES["weights first"])


def test_the_table_serves_every_number_of_rows() -> None:
    assert [tiles.rows for tiles in HOPPER] == sorted(tiles.rows for tiles in HOPPER)
    assert tiles_for(0.01) is HOPPER[0]
    assert tiles_for(1e9) is HOPPER[-1]
