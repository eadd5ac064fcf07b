"""Rows of a rank's own tokens, grouped by slot, and their weighted sums: dispatch and combine without a network.

No host synchronisation, static shapes: the N = T·K rows are packed slot by slot, rows that go nowhere are missing at
the end. A row's place is the number of rows of lower slots plus that of earlier rows of its own slot: a counting sort.

Dimensions: T tokens, K choices a token, N = T·K, H hidden size, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from expertmesh.kernels.triton_support import IS_INTERPRETED, OVERLAPPING, OVERLAPS

_COUNTED_BY_ALL = 2048 if not IS_INTERPRETED else 64
"""Up to so many rows every program counts for itself where its row goes: one launch, no memory to share."""
_ROWS_ALONE = (
    512 if not IS_INTERPRETED else 16
)  # up to so many rows each has a program of its own, which counts for it alone
_ROWS_TOGETHER = 4
_ROWS_A_PROGRAM = 1024
_WIDTH = 2048  # elements of a row at a time


@dataclass(frozen=True, slots=True)
class RowGroups:
    """``rows_NH`` packed by slot, ``counts_S`` int32, ``place_TK`` int32: the row of each choice, -1 = none."""

    rows_NH: torch.Tensor
    counts_S: torch.Tensor
    place_TK: torch.Tensor


def group_rows_reference(x_TH: torch.Tensor, slot_TK: torch.Tensor, counts_S: torch.Tensor) -> RowGroups:
    """``group_rows`` in plain torch; rows of no slot are 0."""
    num_slots, top_k = len(counts_S), slot_TK.shape[1]
    key_N = torch.where(slot_TK < 0, num_slots, slot_TK).flatten()
    order_N = key_N.sort(stable=True).indices
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    counts_S.copy_(torch.bincount(key_N, minlength=num_slots + 1)[:num_slots])
    rows_NH = x_TH[order_N // top_k] * (key_N[order_N] < num_slots)[:, None]
    place_TK = torch.where(slot_TK < 0, -1, place_N.view(slot_TK.shape))
    return RowGroups(rows_NH, counts_S, place_TK.int())


def group_rows(x_TH: torch.Tensor, slot_TK: torch.Tensor, counts_S: torch.Tensor) -> RowGroups:
    """A row for each choice of each token, grouped by slot.

    Args:
        x_TH: bfloat16 or float32, contiguous.
        slot_TK: int64, -1 = nowhere.
        counts_S: int32, overwritten with the rows of each slot.

    Returns:
        the groups; rows of no slot, the last ones, are left undefined. Within a slot rows come in the tokens' order
        up to 2048 rows in all; beyond it in any order.
    """
    (num_tokens, hidden_size), top_k, num_slots = x_TH.shape, slot_TK.shape[1], len(counts_S)
    num_rows = num_tokens * top_k
    rows_NH = x_TH.new_empty(num_rows, hidden_size)
    place_TK = torch.empty(slot_TK.shape, dtype=torch.int32, device=x_TH.device)
    sizes = {"WIDTH": min(_WIDTH, triton.next_power_of_2(hidden_size)), "num_warps": 4}
    if num_rows <= _COUNTED_BY_ALL:
        together = 1 if num_rows <= _ROWS_ALONE else _ROWS_TOGETHER
        _group_few_kernel[(max(triton.cdiv(num_rows, together), num_slots),)](
            x_TH,
            slot_TK,
            rows_NH,
            counts_S,
            place_TK,
            num_rows,
            num_slots,
            hidden_size,
            TOP_K=top_k,
            ROWS=triton.next_power_of_2(max(num_rows, 16)),
            TOGETHER=together,
            OVERLAPS=OVERLAPS,
            **sizes,
            **OVERLAPPING,
        )
        return RowGroups(rows_NH, counts_S, place_TK)
    counts_S.zero_()
    taken_S = torch.zeros_like(counts_S)
    grid = (triton.cdiv(num_rows, _ROWS_A_PROGRAM),)
    _count_kernel[grid](slot_TK, counts_S, num_rows, BLOCK=_ROWS_A_PROGRAM)
    _place_kernel[grid](
        slot_TK,
        counts_S,
        taken_S,
        place_TK,
        num_rows,
        num_slots,
        SLOTS=triton.next_power_of_2(num_slots + 1),
        BLOCK=_ROWS_A_PROGRAM,
    )
    _move_kernel[(num_rows,)](x_TH, place_TK, rows_NH, hidden_size, TOP_K=top_k, **sizes)
    return RowGroups(rows_NH, counts_S, place_TK)


def combine_rows_reference(y_NH: torch.Tensor, place_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """``combine_rows`` in plain torch."""
    y_TKH = y_NH[place_TK.clamp(min=0).long()].float()
    y_TKH = y_TKH.where((place_TK >= 0)[..., None], 0.0)
    return (y_TKH * weight_TK[..., None]).sum(1).to(y_NH.dtype)


def combine_rows(y_NH: torch.Tensor, place_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """out[T, H] = Σ over K of weight × y of the choice's row, added up in float32 in the order of choices.

    Args:
        y_NH: bfloat16 or float32, contiguous. place_TK: of ``group_rows``. weight_TK: float32.
    """
    num_tokens, top_k = place_TK.shape
    hidden_size = y_NH.shape[1]
    out_TH = y_NH.new_empty(num_tokens, hidden_size)
    width = min(_WIDTH // 2, triton.next_power_of_2(hidden_size))
    if num_tokens:
        _combine_kernel[(num_tokens, triton.cdiv(hidden_size, width))](
            y_NH,
            place_TK,
            weight_TK,
            out_TH,
            hidden_size,
            TOP_K=top_k,
            WIDTH=width,
            OVERLAPS=OVERLAPS,
            num_warps=4,
            **OVERLAPPING,
        )
    return out_TH


@triton.jit
def _copy_row(source, to, hidden_size, WIDTH: tl.constexpr):
    for first in range(0, hidden_size, WIDTH):
        h_H = first + tl.arange(0, WIDTH)
        tl.store(to + h_H, tl.load(source + h_H, mask=h_H < hidden_size), mask=h_H < hidden_size)


@triton.jit(do_not_specialize=["num_rows"])
def _group_few_kernel(
    x, slots, rows, counts, places, num_rows, num_slots, hidden_size,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, TOGETHER: tl.constexpr, WIDTH: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Program i moves TOGETHER rows and counts the rows of slot i."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pid = tl.program_id(0)
    n_N = tl.arange(0, ROWS)
    slot_N = tl.load(slots + n_N, mask=n_N < num_rows, other=-1).to(tl.int32)
    if pid < num_slots:
        tl.store(counts + pid, tl.sum((slot_N == pid).to(tl.int32), 0))
    for i in tl.static_range(TOGETHER):
        row = pid * TOGETHER + i
        if row < num_rows:
            slot = tl.load(slots + row).to(tl.int32)
            is_before_N = ((slot_N < slot) & (slot_N >= 0)) | ((slot_N == slot) & (n_N < row))
            place = tl.sum(is_before_N.to(tl.int32), 0)
            if slot >= 0:
                tl.store(places + row, place)
                source = x + (row // TOP_K).to(tl.int64) * hidden_size
                _copy_row(source, rows + place.to(tl.int64) * hidden_size, hidden_size, WIDTH)
            else:
                tl.store(places + row, -1)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(slots, counts, num_rows, BLOCK: tl.constexpr):
    n_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot_N = tl.load(slots + n_N, mask=n_N < num_rows, other=-1)
    tl.atomic_add(counts + slot_N, tl.full((BLOCK,), 1, tl.int32), mask=slot_N >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def _place_kernel(
    slots, counts, taken, places, num_rows, num_slots, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    s_S = tl.arange(0, SLOTS)
    count_S = tl.load(counts + s_S, mask=s_S < num_slots, other=0)
    start_S = tl.cumsum(count_S, 0) - count_S
    n_N = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot_N = tl.load(slots + n_N, mask=n_N < num_rows, other=-1).to(tl.int32)
    is_there_N = slot_N >= 0
    own_N = tl.atomic_add(taken + slot_N, tl.full((BLOCK,), 1, tl.int32), mask=is_there_N, sem="relaxed")
    start_N = tl.gather(start_S, tl.where(is_there_N, slot_N, 0), 0)
    tl.store(places + n_N, tl.where(is_there_N, start_N + own_N, -1), mask=n_N < num_rows)


@triton.jit
def _move_kernel(x, places, rows, hidden_size, TOP_K: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    place = tl.load(places + row).to(tl.int64)
    if place >= 0:
        _copy_row(x + (row // TOP_K).to(tl.int64) * hidden_size, rows + place * hidden_size, hidden_size, WIDTH)


@triton.jit
def _combine_kernel(
    y, places, weights, out, hidden_size, TOP_K: tl.constexpr, WIDTH: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    h_H = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_in_H = h_H < hidden_size
    sum_H = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights + token * TOP_K + k)
        y_H = tl.load(y + place * hidden_size + h_H, mask=is_in_H & (place >= 0), other=0.0)
        sum_H += y_H.to(tl.float32) * weight
    tl.store(out + token * hidden_size + h_H, sum_H.to(out.dtype.element_ty), mask=is_in_H)
