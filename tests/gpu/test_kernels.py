"""Every kernel on a GPU against its reference, at the sizes that models have and at odd ones."""

from __future__ import annotations

import pytest
import torch

from expertmesh.kernels.few_rows import MOST_ROWS
from expertmesh.kernels.gate import Gate
from expertmesh.kernels.grouped_mlp import grouped_expert_mlp, library_expert_mlp
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.kernels.grouped_mlp_tiles import FP8, FP8_ROUNDED, HOPPER, Tiles
from expertmesh.kernels.paged_decode import (
    TUNINGS,
    DecodePlan,
    Tuning,
    paged_decode_attention,
    paged_decode_attention_reference,
)
from support.engine_checks import check_embed, check_paged_prefill, check_row_groups, check_slot_table
from support.gate_checks import check_route, replica_prices, slot_tables
from support.grouped_mlp_checks import check_grouped_mlp, check_grouped_mlp_fp8
from support.kernel_checks import (
    check_add_rms_norm,
    check_fp8_rows,
    check_gumbel_argmax,
    check_paged_decode,
    check_product_of_few,
    check_rope_append,
)
from support.kernel_draws import Draw, assert_near

BF16 = torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16])


def routed_counts(num_slots: int, num_tokens: int, top_k: int) -> list[int]:
    generator = torch.Generator().manual_seed(num_slots + num_tokens + top_k)
    expert_TK = torch.rand(num_tokens, num_slots, generator=generator).topk(top_k).indices
    return torch.bincount(expert_TK.flatten(), minlength=num_slots).tolist()


@pytest.mark.parametrize("top_k", range(1, 9))
@pytest.mark.parametrize("num_tokens", [1, 13, 200])
def test_mlp_of_routed_tokens(num_tokens: int, top_k: int) -> None:
    check_grouped_mlp("cuda", routed_counts(32, num_tokens, top_k), 512, 192, BF16)


@pytest.mark.parametrize("tiles", HOPPER, ids=lambda tiles: f"up to {tiles.rows}")
@pytest.mark.parametrize(
    "counts",
    [[0] * 16, [0] * 15 + [3000], [2500] + [0] * 15, [1] * 16, [129, 0, 1, 63, 64, 65, 0, 127, 128, 2, 300]],
    ids=["none", "all to the last", "all to the first", "one each", "ragged"],
)
def test_mlp_with_every_row_of_the_table(counts: list[int], tiles: Tiles) -> None:
    check_grouped_mlp("cuda", counts, 2048, 768, BF16, tiles=tiles, spare=3)
    check_grouped_mlp("cuda", counts, 264, 136, BF16, tiles=tiles, gap=5)
    check_grouped_mlp("cuda", counts, 2048, 768, BF16, tiles=tiles, spare=3, has_factors=True)


@DTYPES
@pytest.mark.parametrize(("hidden", "width"), [(33, 7), (100, 50), (264, 136)])
def test_mlp_of_odd_sizes(hidden: int, width: int, dtype: torch.dtype) -> None:
    check_grouped_mlp("cuda", [5, 0, 70, 1, 0], hidden, width, dtype, spare=2)


def test_mlp_of_large_experts() -> None:
    check_grouped_mlp("cuda", routed_counts(32, 64, 8), 7168, 2048, BF16)


@pytest.mark.parametrize(
    ("rounds_rows", "tiles"),
    [*((False, tiles) for tiles in FP8), *((True, tiles) for tiles in FP8_ROUNDED)],
    ids=lambda value: f"up to {value.rows}" if isinstance(value, Tiles) else f"rounds {value}",
)
@pytest.mark.parametrize(
    "counts",
    [[0] * 16, [0] * 15 + [3000], [2500] + [0] * 15, [1] * 16, [129, 0, 1, 63, 64, 65, 0, 127, 128, 2, 300]],
    ids=["none", "all to the last", "all to the first", "one each", "ragged"],
)
def test_fp8_mlp_with_every_row_of_the_tables(counts: list[int], rounds_rows: bool, tiles: Tiles) -> None:
    check_grouped_mlp_fp8("cuda", counts, 2048, 768, rounds_rows=rounds_rows, tiles=tiles, spare=3)
    check_grouped_mlp_fp8("cuda", counts, 384, 128, rounds_rows=rounds_rows, tiles=tiles, gap=5, has_factors=True)
    if not rounds_rows:
        check_grouped_mlp_fp8("cuda", counts, 272, 144, rounds_rows=False, tiles=tiles)


@pytest.mark.parametrize("rounds_rows", [False, True])
@pytest.mark.parametrize("top_k", range(1, 9))
def test_fp8_mlp_of_routed_tokens(top_k: int, rounds_rows: bool) -> None:
    for num_tokens in (1, 13, 200):
        check_grouped_mlp_fp8("cuda", routed_counts(32, num_tokens, top_k), 512, 256, rounds_rows=rounds_rows)


def test_mlp_in_a_graph_follows_the_counts() -> None:
    """Captured once; replayed with other counts in the same memory, it computes those."""
    draw = Draw(5, "cuda")
    rows_NH, gate_up, down = draw.normal(512, 512, dtype=BF16), draw.normal(16, 256, 512), draw.normal(16, 512, 128)
    gate_up, down = (gate_up / 512**0.5).to(BF16), (down / 128**0.5).to(BF16)
    counts_S = torch.full((16,), 32, device="cuda")
    grouped_expert_mlp_gpu(rows_NH, counts_S, gate_up, down)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_NH = grouped_expert_mlp(rows_NH, counts_S, gate_up, down)
    for counts in ([32] * 16, [0] * 15 + [512], [100, 0, 50] + [0] * 13, [0] * 16):
        counts_S.copy_(torch.tensor(counts))
        y_NH.fill_(float("nan"))
        graph.replay()
        total = sum(counts)
        expected = library_expert_mlp(rows_NH, counts_S, gate_up, down)
        assert_near(y_NH[:total], expected[:total], BF16)


@pytest.mark.parametrize("tiles", HOPPER, ids=lambda tiles: f"up to {tiles.rows}")
def test_mlp_of_a_row_is_the_same_whatever_the_others_are(tiles: Tiles) -> None:
    draw = Draw(6, "cuda")
    rows_NH, gate_up, down = draw.normal(300, 512, dtype=BF16), draw.normal(4, 256, 512), draw.normal(4, 512, 128)
    gate_up, down = (gate_up / 512**0.5).to(BF16), (down / 128**0.5).to(BF16)
    together = grouped_expert_mlp_gpu(
        rows_NH, torch.tensor([100, 0, 150, 50], device="cuda"), gate_up, down, tiles=tiles
    )
    alone = grouped_expert_mlp_gpu(
        rows_NH[100:107].contiguous(), torch.tensor([0, 0, 7, 0], device="cuda"), gate_up, down, tiles=tiles
    )
    assert torch.equal(alone, together[100:107])


@DTYPES
@pytest.mark.parametrize(
    "tuning", [None, *(tuning for _, tuning in TUNINGS), Tuning(1, 32, 2, 2), Tuning(16, 16, 1, 3)], ids=str
)
@pytest.mark.parametrize("lengths", [[1], [1000], [0, 17, 4000, 1, 255, 256, 257], list(range(0, 640, 10))], ids=len)
def test_paged_decode(lengths: list[int], tuning: Tuning, dtype: torch.dtype) -> None:
    check_paged_decode(
        "cuda", lengths, dtype, heads=32, kv_heads=4, head_dim=128, block_size=16, tuning=tuning, launches=3
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(8, 8, 64, 32), (20, 1, 128, 16), (48, 2, 256, 8), (6, 2, 16, 64)]
)
def test_paged_decode_of_other_shapes(heads: int, kv_heads: int, head_dim: int, block_size: int) -> None:
    check_paged_decode(
        "cuda", [300, 0, 77], BF16, heads=heads, kv_heads=kv_heads, head_dim=head_dim, block_size=block_size
    )


def test_paged_decode_in_a_graph_follows_the_lengths() -> None:
    """Captured once, plan and all; replayed with other lengths in the same memory."""
    draw = Draw(8, "cuda")
    cache, q_SHD = draw.normal(1300, 16, 8, 128, dtype=BF16), draw.normal(4, 32, 128, dtype=BF16)
    key, value, blocks_ST = cache[:, :, :4], cache[:, :, 4:], draw.order(1300)[: 4 * 320].view(4, 320)
    lengths_S = torch.tensor([700, 0, 33, 5000], device="cuda")
    plan = DecodePlan(max_seqs=4, num_heads=32, num_kv_heads=4, head_dim=128, device=q_SHD.device)
    plan.update(lengths_S)
    paged_decode_attention(q_SHD, key, value, blocks_ST, lengths_S, plan=plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.update(lengths_S)
        answer = paged_decode_attention(q_SHD, key, value, blocks_ST, lengths_S, plan=plan)
    for lengths in ([700, 0, 33, 5000], [5120] * 4, [0, 1, 2, 3], [0] * 4, [64, 64, 0, 4097]):
        lengths_S.copy_(torch.tensor(lengths))
        answer.fill_(float("nan"))
        graph.replay()
        assert_near(answer, paged_decode_attention_reference(q_SHD, key, value, blocks_ST, lengths_S), BF16)


@DTYPES
@pytest.mark.parametrize("top_k", range(1, 9))
def test_route_softmax(top_k: int, dtype: torch.dtype) -> None:
    tables = slot_tables(Draw(top_k, "cuda"), 128, width=2, slots_per_rank=40, node_R=(0, 0, 0, 0, 1, 1, 1, 1))
    check_route("cuda", Gate(top_k=top_k), tables, 320, 333, dtype, padding=top_k)


@DTYPES
@pytest.mark.parametrize(("experts", "width"), [(256, 1), (256, 3), (160, 2)])
def test_route_sigmoid(experts: int, width: int, dtype: torch.dtype) -> None:
    slots_per_rank = experts * width // 32 + 1
    node_R = tuple(rank // 8 for rank in range(32))
    tables = slot_tables(Draw(width, "cuda"), experts, width=width, slots_per_rank=slots_per_rank, node_R=node_R)
    gate = Gate(top_k=8, scoring="sigmoid", num_groups=8, top_groups=4, scale=2.5)
    check_route("cuda", gate, tables, 32 * slots_per_rank, 500, dtype, has_bias=True)


@pytest.mark.parametrize("num_rows", [1, 2, 17, 33, MOST_ROWS])
@pytest.mark.parametrize(("num_columns", "depth"), [(5120, 2048), (2048, 4096), (128, 2048), (200, 72)])
def test_product_of_few_rows(num_rows: int, num_columns: int, depth: int) -> None:
    check_product_of_few("cuda", num_rows, num_columns, depth)


@pytest.mark.parametrize("num_parts", [2, 16])
def test_parts_of_products_are_added_up(num_parts: int) -> None:
    check_add_rms_norm("cuda", 33, 2048, BF16, num_parts=num_parts)
    check_rope_append("cuda", 33, BF16, heads=32, kv_heads=4, head_dim=128, num_parts=num_parts)
    tables = slot_tables(Draw(1, "cuda"), 128, width=1, slots_per_rank=32, node_R=(0, 0, 0, 0))
    check_route("cuda", Gate(top_k=8), tables, 128, 33, BF16, num_parts=num_parts, padding=2)


@DTYPES
@pytest.mark.parametrize("hidden", [2048, 7168, 333])
def test_add_rms_norm(hidden: int, dtype: torch.dtype) -> None:
    check_add_rms_norm("cuda", 257, hidden, dtype)


@DTYPES
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 4, 128), (10, 2, 64), (1, 1, 256)])
def test_rope_append(heads: int, kv_heads: int, head_dim: int, has_norm: bool, dtype: torch.dtype) -> None:
    check_rope_append("cuda", 129, dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, has_norm=has_norm)


@DTYPES
@pytest.mark.parametrize("vocab", [151_936, 4_097, 100])
def test_gumbel_argmax(vocab: int, dtype: torch.dtype) -> None:
    check_gumbel_argmax("cuda", 33, vocab, dtype)


def test_no_kernel_waits_for_the_device() -> None:
    """Anything that synchronises raises while the whole of a decode step's kernels runs."""
    draw = Draw(7, "cuda")
    tables = slot_tables(draw, 16, width=2, slots_per_rank=8, node_R=(0, 0, 1, 1))
    from expertmesh.kernels.gate import route
    from expertmesh.kernels.norm import add_rms_norm
    from expertmesh.kernels.sampler import gumbel_argmax

    x_TH, residual_TH, weight_H = draw.normal(8, 512, dtype=BF16), draw.normal(8, 512, dtype=BF16), draw.normal(512)
    logits, prices = draw.normal(8, 16, dtype=BF16), replica_prices(draw, tables)
    temperature, seeds = torch.ones(8, device="cuda"), draw.integers(9, 8)
    weight_H, gate_up, down = (
        weight_H.to(BF16),
        draw.normal(16, 256, 512, dtype=BF16),
        draw.normal(16, 512, 128, dtype=BF16),
    )
    counts = torch.full((16,), 0, device="cuda").index_fill_(0, torch.tensor([3], device="cuda"), 8)
    for _ in range(2):  # the first round compiles
        normed = add_rms_norm(x_TH, residual_TH, weight_H, 1e-6)
        route(logits, Gate(top_k=4), tables, prices=prices)
        grouped_expert_mlp(normed, counts, gate_up, down)
        gumbel_argmax(logits, temperature, seeds, seeds)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@DTYPES
@pytest.mark.parametrize(("num_tokens", "hidden", "end"), [(3, 256, 2), (1, 128, 1), (4096, 7168, 4000), (0, 128, 0)])
def test_rows_survive_float8_within_its_noise(num_tokens: int, hidden: int, end: int, dtype: torch.dtype) -> None:
    check_fp8_rows("cuda", num_tokens, hidden, end, dtype)


@DTYPES
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 65, 256, 257, 3000])
def test_row_groups(num_tokens: int, dtype: torch.dtype) -> None:
    check_row_groups("cuda", num_tokens, 8, 128, 2048, dtype, padding=num_tokens // 5)
    check_row_groups("cuda", num_tokens, 3, 7, 333, dtype)


@DTYPES
@pytest.mark.parametrize(
    ("starts", "counts"),
    [([0], [1]), ([0, 500, 7], [128, 129, 1]), ([1000], [700]), ([0] * 20, list(range(1, 400, 20)))],
)
def test_paged_prefill(starts: list[int], counts: list[int], dtype: torch.dtype) -> None:
    check_paged_prefill("cuda", starts, counts, dtype, heads=32, kv_heads=4, head_dim=128, block_size=16)
    check_paged_prefill("cuda", starts, counts, dtype, heads=6, kv_heads=2, head_dim=64, block_size=8)


@DTYPES
def test_embed(dtype: torch.dtype) -> None:
    check_embed("cuda", dtype)


@DTYPES
def test_slots_behind_a_table(dtype: torch.dtype) -> None:
    check_slot_table("cuda", 2048, 768, dtype)
