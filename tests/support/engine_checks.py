"""The kernels between the others of an engine, against their references, on any device; see ``kernel_checks``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from expertmesh.kernels.embed import embed, embed_reference
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.kernels.paged_prefill import (
    TUNING,
    Tuning,
    paged_prefill_attention,
    paged_prefill_attention_reference,
    prefill_pieces,
    queries_a_piece,
)
from expertmesh.kernels.row_groups import combine_rows, combine_rows_reference, group_rows, group_rows_reference
from support.kernel_draws import Draw, assert_near, poisoned


def check_row_groups(
    device: str, num_tokens: int, top_k: int, num_slots: int, hidden: int, dtype: torch.dtype, *, padding: int = 0
) -> None:
    """The last ``padding`` tokens go nowhere, and neither does every seventh choice of the others."""
    draw = Draw(num_tokens * 10 + top_k, device)
    x_TH = draw.normal(num_tokens, hidden, dtype=dtype)
    slot_TK = draw.normal(num_tokens, num_slots).topk(top_k).indices
    slot_TK.view(-1)[::7] = -1
    slot_TK[num_tokens - padding :] = -1
    counts_S, expected_counts_S = (torch.full((num_slots,), 77, dtype=torch.int32, device=device) for _ in range(2))
    with poisoned():
        groups = group_rows(x_TH, slot_TK, counts_S)
    expected = group_rows_reference(x_TH, slot_TK, expected_counts_S)
    assert torch.equal(counts_S, expected_counts_S)
    total = int(counts_S.sum())
    places = groups.place_TK[slot_TK >= 0]
    assert sorted(places.tolist()) == list(range(total)), "every row has a place of its own"
    assert (groups.place_TK[slot_TK < 0] == -1).all()
    slot_of_place = torch.empty(total, dtype=torch.int64, device=device)
    slot_of_place[places.long()] = slot_TK[slot_TK >= 0]
    assert (slot_of_place.diff() >= 0).all(), "places follow the slots"
    token_TK = torch.arange(num_tokens, device=device)[:, None].expand(-1, top_k)
    assert torch.equal(groups.rows_NH[places.long()], x_TH[token_TK[slot_TK >= 0]])
    weight_TK = draw.normal(num_tokens, top_k)
    with poisoned():
        out_TH = combine_rows(groups.rows_NH, groups.place_TK, weight_TK)
    assert_near(out_TH, combine_rows_reference(expected.rows_NH, expected.place_TK, weight_TK), dtype)


def check_paged_prefill(
    device: str,
    starts: Sequence[int],
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    tuning: Tuning = TUNING,
) -> None:
    """Chunks of ``counts`` tokens behind ``starts`` cached ones; what nobody may read holds NaN."""
    draw = Draw(sum(counts) + heads, device)
    num_seqs, ends = len(counts), [start + count for start, count in zip(starts, counts, strict=True)]
    width = -(-max(ends) // block_size) + 1
    cache = draw.normal(num_seqs * width + 2, block_size, 2 * kv_heads, head_dim, dtype=dtype)
    blocks_SW = draw.order(len(cache))[: num_seqs * width].view(num_seqs, width).int()
    for s, end in enumerate(ends):
        beyond = torch.arange(end, width * block_size, device=device)
        cache[blocks_SW[s, beyond // block_size].long(), beyond % block_size] = float("nan")
    q_THD = draw.normal(sum(counts), heads, head_dim, dtype=dtype)
    queries = queries_a_piece(heads, kv_heads, tuning)
    pieces = torch.from_numpy(prefill_pieces(np.array(counts), np.array(starts), queries)).to(device)
    key, value = cache[:, :, :kv_heads], cache[:, :, kv_heads:]
    out_THD = torch.full_like(q_THD, float("nan"))
    paged_prefill_attention(q_THD, key, value, blocks_SW, pieces, out_THD, tuning=tuning)
    assert_near(out_THD, paged_prefill_attention_reference(q_THD, key, value, blocks_SW, pieces), dtype)


def check_embed(device: str, dtype: torch.dtype) -> None:
    draw = Draw(1, device)
    table_VH = draw.normal(50, 33, dtype=dtype)
    token_T, row_T = draw.integers(50, 9), draw.integers(4, 9)
    token_T[::2] = -1
    last_R = draw.integers(50, 4)
    with poisoned():
        actual = embed(token_T.int(), row_T.int(), last_R, table_VH)
    assert torch.equal(actual, embed_reference(token_T, row_T, last_R, table_VH))


def check_slot_table(device: str, hidden: int, width: int, dtype: torch.dtype) -> None:
    """Slots whose weights lie elsewhere in an arena, among NaN."""
    draw = Draw(hidden, device)
    counts = torch.tensor([3, 0, 5, 1], device=device)
    rows_NH = draw.normal(9, hidden, dtype=dtype)
    gate_up = (draw.normal(4, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (draw.normal(4, hidden, width) / width**0.5).to(dtype)
    table_S = torch.tensor([5, 1, 0, 6], dtype=torch.int32, device=device)
    arenas = [torch.full((8, *part.shape[1:]), float("nan"), dtype=dtype, device=device) for part in (gate_up, down)]
    for arena, part in zip(arenas, (gate_up, down), strict=True):
        arena[table_S.long()] = part
    actual = grouped_expert_mlp_gpu(rows_NH, counts, *arenas, table_S=table_S)
    assert torch.equal(actual, grouped_expert_mlp_gpu(rows_NH, counts, gate_up, down))
