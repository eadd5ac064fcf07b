"""Where a program's tile of a grouped matrix product is: found from the counts, which only the device knows.

Dimensions: S slots; see ``grouped_mlp_gpu`` for tiles and slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_ROW_BLOCKS = tl.constexpr(16)
"""Row blocks whose tiles are neighbours: their rows stay in the L2 cache from column to column."""


@triton.jit
def count_tiles(
    counts, table, num_slots, num_columns,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """Slots, their rows, row blocks, where their row blocks end and their weights are; and the number of tiles."""
    slot_S = tl.arange(0, SLOTS)
    count_S = tl.load(counts + slot_S, mask=slot_S < num_slots, other=0).to(tl.int32)
    home_S = slot_S
    if HAS_TABLE:
        home_S = tl.load(table + slot_S, mask=slot_S < num_slots, other=0).to(tl.int32)
    blocks_S = tl.cdiv(count_S, BLOCK_M)
    return (
        slot_S,
        count_S,
        blocks_S,
        tl.cumsum(blocks_S, 0),
        home_S,
        tl.sum(blocks_S, 0) * tl.cdiv(num_columns, BLOCK_N),
    )


@triton.jit
def place_tile(
    tile, starts, slot_S, count_S, blocks_S, end_S, home_S, num_columns, BLOCK_N: tl.constexpr, HAS_STARTS: tl.constexpr
):  # fmt: skip
    """The slot's first row, its rows and where its weights are; the tile's row block in it and first column."""
    column_blocks = tl.cdiv(num_columns, BLOCK_N)
    slot = tl.sum((end_S * column_blocks <= tile).to(tl.int32), 0)
    is_it = slot_S == slot
    count = tl.sum(tl.where(is_it, count_S, 0), 0)
    blocks = tl.sum(tl.where(is_it, blocks_S, 0), 0)
    # Blocks of rows run fastest, so that tiles which share weights run at the same time, but no more than a group of
    # them before the next columns, so that their rows are still in the cache.
    local = tile - tl.sum(tl.where(slot_S < slot, blocks_S, 0), 0) * column_blocks
    first_block = local // (GROUP_ROW_BLOCKS * column_blocks) * GROUP_ROW_BLOCKS
    group_size = tl.minimum(blocks - first_block, GROUP_ROW_BLOCKS)
    in_group = local - first_block * column_blocks
    block = first_block + in_group % group_size
    column = in_group // group_size * BLOCK_N
    if HAS_STARTS:
        start = tl.load(starts + slot).to(tl.int32)
    else:
        start = tl.sum(tl.where(slot_S < slot, count_S, 0), 0)
    home = tl.sum(tl.where(is_it, home_S, 0), 0)
    return start, count, home, block, column


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) · up in float32, rounded where torch rounds: each product and silu."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return silu * up.to(dtype).to(tl.float32)
