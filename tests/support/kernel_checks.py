"""Kernels against their references, on any device: the unit tests run them in Triton's interpreter, tests/gpu on a GPU.

Imports the kernels alone, so that it runs on a machine that has no more than torch and Triton.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from expertmesh.kernels.fp8_rows import (
    BLOCK,
    dequantize_rows,
    dequantize_rows_reference,
    quantize_rows,
    quantize_rows_reference,
)
from expertmesh.kernels.gate import Gate, ReplicaPrices, RoutingTotals, SlotTables, route, route_reference
from expertmesh.kernels.grouped_mlp_fp8 import (
    Fp8Experts,
    grouped_expert_mlp_fp8,
    grouped_expert_mlp_fp8_reference,
    scale_shapes,
)
from expertmesh.kernels.grouped_mlp_gpu import grouped_expert_mlp_gpu
from expertmesh.kernels.grouped_mlp_tiles import Tiles
from expertmesh.kernels.norm import add_rms_norm, add_rms_norm_reference
from expertmesh.kernels.paged_decode import (
    DecodePlan,
    Tuning,
    paged_decode_attention,
    paged_decode_attention_reference,
)
from expertmesh.kernels.rope_append import rope_append, rope_append_reference
from expertmesh.kernels.sampler import gumbel_argmax, gumbel_argmax_reference

# bfloat16 keeps 8 bits, and the interpreter cuts off the others where hardware rounds.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class Draw:
    """Random tensors on a device, the same for a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def order(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator, device=self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a kernel allocates and does not write holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, *, slack: float = 1) -> None:
    """In the mean and at the worst element, within ``slack`` times what is usual; NaN fails."""
    tolerance = slack * TOLERANCE[dtype]
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    difference, expected = actual.double() - expected.double(), expected.double()
    error = difference.norm() / expected.norm().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"
    worst, top = difference.abs().amax(), expected.abs().amax()
    assert worst <= 2 * tolerance * top, f"an element is off by {worst:.2e}, the largest is {top:.2e}"


def expert_mlp_reference(
    rows_NH: torch.Tensor, counts: Sequence[int], starts: Sequence[int], gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """A float64 loop over slots; rows of no slot are 0."""
    y_NH = torch.zeros_like(rows_NH, dtype=torch.float64)
    for slot, (count, start) in enumerate(zip(counts, starts, strict=True)):
        rows = slice(start, start + count)
        gate, up = (rows_NH[rows].double() @ gate_up[slot].double().T).chunk(2, dim=-1)
        y_NH[rows] = (torch.nn.functional.silu(gate) * up) @ down[slot].double().T
    return y_NH


def check_grouped_mlp(
    device: str,
    counts: Sequence[int],
    hidden: int,
    width: int,
    dtype: torch.dtype,
    *,
    tiles: Tiles | None = None,
    gap: int = 0,
    spare: int = 0,
    has_factors: bool = False,
) -> None:
    """``gap`` rows between slots and ``spare`` rows at the end belong to nobody and hold NaN."""
    draw = Draw(sum(counts) * 1000 + hidden + width, device)
    starts, end = [], 0
    for count in counts:
        starts.append(end)
        end += count + gap
    rows_NH = draw.normal(end + spare, hidden, dtype=dtype)
    is_used_N = torch.zeros(end + spare, dtype=torch.bool, device=device)
    for count, start in zip(counts, starts, strict=True):
        is_used_N[start : start + count] = True
    rows_NH[~is_used_N] = float("nan")
    gate_up_SFH = (draw.normal(len(counts), 2 * width, hidden) / hidden**0.5).to(dtype)
    down_SHI = (draw.normal(len(counts), hidden, width) / width**0.5).to(dtype)
    factor_N = draw.normal(end + spare).masked_fill(~is_used_N, float("nan")) if has_factors else None
    with poisoned():
        y_NH = grouped_expert_mlp_gpu(
            rows_NH,
            torch.tensor(counts, device=device),
            gate_up_SFH,
            down_SHI,
            starts_S=torch.tensor(starts, device=device, dtype=torch.int32) if gap else None,
            factor_N=factor_N,
            tiles=tiles,
        )
    assert y_NH.dtype == dtype
    expected_NH = expert_mlp_reference(rows_NH, counts, starts, gate_up_SFH, down_SHI)
    if factor_N is not None:
        expected_NH = (expected_NH.float() * factor_N[:, None]).to(dtype)
    assert_near(y_NH[is_used_N], expected_NH[is_used_N], dtype)


def fp8_experts(draw: Draw, num_experts: int, hidden: int, width: int) -> Fp8Experts:
    """Drawn at random; scales of neighbouring blocks differ by up to a factor of four."""
    gate_up_scale, down_scale = (
        (0.25 + 0.75 * torch.rand(num_experts, *shape, generator=draw.generator, device=draw.device)) / depth**0.5
        for shape, depth in zip(scale_shapes(hidden, width), (hidden, width), strict=True)
    )
    return Fp8Experts(
        gate_up_AFH=draw.normal(num_experts, 2 * width, hidden, dtype=torch.float8_e4m3fn),
        down_AHI=draw.normal(num_experts, hidden, width, dtype=torch.float8_e4m3fn),
        gate_up_scale_A2YX=gate_up_scale,
        down_scale_AXY=down_scale,
    )


def check_grouped_mlp_fp8(
    device: str,
    counts: Sequence[int],
    hidden: int,
    width: int,
    *,
    rounds_rows: bool,
    tiles: Tiles | None = None,
    gap: int = 0,
    spare: int = 0,
    has_factors: bool = False,
) -> None:
    """Slots behind a table, the last expert's weights first; ``gap`` and ``spare`` as in ``check_grouped_mlp``."""
    draw, num_slots = Draw(sum(counts) + hidden + width, device), len(counts)
    experts = fp8_experts(draw, num_slots, hidden, width)
    table_S = torch.arange(num_slots - 1, -1, -1, dtype=torch.int32, device=device)
    turned = Fp8Experts(
        gate_up_AFH=experts.gate_up_AFH.view(torch.uint8).flip(0).view(torch.float8_e4m3fn),
        down_AHI=experts.down_AHI.view(torch.uint8).flip(0).view(torch.float8_e4m3fn),
        gate_up_scale_A2YX=experts.gate_up_scale_A2YX.flip(0),
        down_scale_AXY=experts.down_scale_AXY.flip(0),
    )
    counts_S = torch.tensor(counts, device=device)
    starts_S = counts_S.cumsum(0) - counts_S + gap * torch.arange(num_slots, device=device)
    place_N = torch.cat([torch.arange(s, s + c) for s, c in zip(starts_S.tolist(), counts, strict=True)]).to(device)
    dense_NH = draw.normal(sum(counts), hidden, dtype=torch.bfloat16)
    rows_NH = torch.full((sum(counts) + gap * num_slots + spare, hidden), float("nan"), device=device).bfloat16()
    rows_NH[place_N] = dense_NH
    factor_N = draw.normal(len(rows_NH)) if has_factors else None
    with poisoned():
        y_NH = grouped_expert_mlp_fp8(
            rows_NH,
            counts_S,
            turned,
            starts_S=starts_S.int() if gap else None,
            table_S=table_S,
            factor_N=factor_N,
            rounds_rows=rounds_rows,
            tiles=tiles,
        )
    expected_NH = grouped_expert_mlp_fp8_reference(dense_NH, counts_S, experts, rounds_rows=rounds_rows).float()
    if factor_N is not None:
        expected_NH *= factor_N[place_N][:, None]
    # Roundings to 3 bits fall to the other side now and then, in the interpreter more often: see check_fp8_rows.
    assert_near(y_NH[place_N], expected_NH, torch.bfloat16, slack=4 if rounds_rows else 1)


def check_paged_decode(
    device: str,
    lengths: Sequence[int],
    dtype: torch.dtype,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    tuning: Tuning | None = None,
    launches: int = 2,
) -> None:
    """Runs ``launches`` times with one plan: what one leaves behind must not disturb the next."""
    draw = Draw(sum(lengths) * 100 + heads, device)
    num_seqs = len(lengths)
    blocks_a_seq = -(-max(lengths) // block_size) + 1
    num_blocks = num_seqs * blocks_a_seq + 3
    # Keys and values side by side, as the cache keeps them; positions beyond a length hold NaN.
    cache = draw.normal(num_blocks, block_size, 2 * kv_heads, head_dim, dtype=dtype)
    blocks_ST = draw.order(num_blocks)[: num_seqs * blocks_a_seq].view(num_seqs, blocks_a_seq).to(torch.int32)
    for s, length in enumerate(lengths):
        positions = torch.arange(length, blocks_a_seq * block_size, device=device)
        cache[blocks_ST[s, positions // block_size].long(), positions % block_size] = float("nan")
    q_SHD = draw.normal(num_seqs, heads, head_dim, dtype=dtype)
    lengths_S = torch.tensor(lengths, device=device, dtype=torch.int32)
    plan = DecodePlan(
        max_seqs=num_seqs + 1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        device=torch.device(device),
        tuning=tuning,
    )
    plan.update(lengths_S)
    key, value = cache[:, :, :kv_heads], cache[:, :, kv_heads:]
    expected = paged_decode_attention_reference(q_SHD, key, value, blocks_ST, lengths_S)
    results = []
    for _ in range(launches):
        with poisoned():
            results.append(paged_decode_attention(q_SHD, key, value, blocks_ST, lengths_S, plan=plan))
        assert_near(results[-1], expected, dtype)
        assert torch.equal(results[-1], results[0]), "two launches differ"


def slot_tables(
    draw: Draw,
    num_experts: int,
    *,
    width: int,
    slots_per_rank: int,
    node_R: Sequence[int],
    own_rank: int = -1,
    own_node: int = -1,
) -> SlotTables:
    """Every expert has 1 .. ``width`` replicas on ranks drawn at random."""
    device, num_ranks = draw.device, len(node_R)
    rank_EW = torch.stack([draw.order(num_ranks)[:width] for _ in range(num_experts)]).to(torch.int32)
    rank_EW[:, 1:][draw.normal(num_experts, width - 1) > 0.5] = -1
    rank_EW = rank_EW.sort(dim=1, descending=True).values  # behind the last one there is none
    replica_EW = rank_EW * slots_per_rank + draw.integers(slots_per_rank, num_experts, width).to(torch.int32)
    return SlotTables(
        replica_EW=replica_EW.where(rank_EW >= 0, -1),
        rank_EW=rank_EW,
        node_R=torch.tensor(node_R, dtype=torch.int32, device=device),
        own_rank=own_rank,
        own_node=own_node,
    )


def replica_prices(draw: Draw, tables: SlotTables) -> ReplicaPrices | None:
    """In 64ths, as rows make them: ties occur. None without replicas."""
    if tables.replica_EW.shape[1] == 1:
        return None
    prices = ReplicaPrices.equal(len(tables.node_R), draw.device)
    prices.price_R.copy_(draw.integers(24, len(tables.node_R)) / 64)
    prices.share_R.copy_(draw.normal(len(tables.node_R)).abs().double().softmax(0))
    prices.after_R.fill_(float("nan"))
    return prices


def routing_totals(num_experts: int, num_slots: int, device: str) -> RoutingTotals:
    return RoutingTotals(
        pairs_EE=torch.ones(num_experts, num_experts, dtype=torch.int64, device=device),
        slot_load_G=torch.ones(num_slots, dtype=torch.int64, device=device),
        visits=torch.ones(2, dtype=torch.int64, device=device),
    )


def check_route(
    device: str,
    gate: Gate,
    tables: SlotTables,
    num_slots: int,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    has_bias: bool = False,
    padding: int = 0,
) -> None:
    """Choices, slots and counters equal the reference's exactly; the last ``padding`` tokens are not there."""
    num_experts = len(tables.replica_EW)
    draw = Draw(num_tokens * 100 + num_experts, device)
    logits_TE = draw.normal(num_tokens, num_experts, dtype=dtype)
    bias_E = draw.normal(num_experts) if has_bias else None
    there = torch.tensor([num_tokens - padding], device=device, dtype=torch.int32) if padding else None
    prices, expected_prices = (replica_prices(Draw(num_tokens, device), tables) for _ in range(2))
    totals, expected_totals = (routing_totals(num_experts, num_slots, device) for _ in range(2))
    with poisoned():
        actual = route(logits_TE, gate, tables, bias_E=bias_E, num_tokens=there, prices=prices, totals=totals)
    expected = route_reference(
        logits_TE, gate, tables, bias_E=bias_E, num_tokens=there, prices=expected_prices, totals=expected_totals
    )
    assert torch.equal(actual.expert_TK, expected.expert_TK)
    assert torch.equal(actual.slot_TK, expected.slot_TK)
    torch.testing.assert_close(
        actual.weight_TK, expected.weight_TK, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-6
    )
    for name in ("pairs_EE", "slot_load_G", "visits"):
        assert torch.equal(getattr(totals, name), getattr(expected_totals, name)), name
    if prices is not None and expected_prices is not None:
        torch.testing.assert_close(prices.after_R, expected_prices.after_R, rtol=1e-12, atol=1e-12)
        assert torch.equal(prices.price_R, expected_prices.price_R), "until the step is completed"
        assert not prices.rows_R.any()


def check_add_rms_norm(device: str, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    draw = Draw(num_tokens + hidden, device)
    x_TH, residual_TH = (draw.normal(num_tokens, hidden, dtype=dtype) for _ in range(2))
    weight_H = draw.normal(hidden, dtype=dtype)
    expected_residual_TH = residual_TH.clone()
    with poisoned():
        actual = add_rms_norm(x_TH, residual_TH, weight_H, 1e-6)
    expected = add_rms_norm_reference(x_TH, expected_residual_TH, weight_H, 1e-6)
    assert_near(residual_TH, expected_residual_TH, dtype)
    assert_near(actual, expected, dtype)


def check_rope_append(
    device: str, num_tokens: int, dtype: torch.dtype, *, heads: int, kv_heads: int, head_dim: int, has_norm: bool = True
) -> None:
    """One token is padding; nothing but the tokens' places may change in the cache."""
    draw = Draw(num_tokens * 10 + heads, device)
    num_places, length = 2 * num_tokens + 5, 50
    qkv_TCD = draw.normal(num_tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    norm_CD = draw.normal(heads + kv_heads, head_dim, dtype=dtype) if has_norm else None
    angle_LR = 10 * draw.normal(length, head_dim // 2)
    position_T = draw.integers(length, num_tokens)
    place_T = draw.order(num_places)[:num_tokens]
    place_T[num_tokens // 2] = -1
    cache_NCD = draw.normal(num_places, 2 * kv_heads, head_dim, dtype=dtype)
    expected_qkv, expected_cache = qkv_TCD.clone(), cache_NCD.clone()
    tables = (1e-6, angle_LR.cos(), angle_LR.sin(), position_T, place_T)
    rope_append(qkv_TCD, norm_CD, *tables, cache_NCD[:, :kv_heads], cache_NCD[:, kv_heads:])
    rope_append_reference(expected_qkv, norm_CD, *tables, expected_cache[:, :kv_heads], expected_cache[:, kv_heads:])
    assert_near(qkv_TCD, expected_qkv, dtype)
    assert_near(cache_NCD, expected_cache, dtype)
    kept = place_T[place_T >= 0]
    untouched = torch.ones(num_places, dtype=torch.bool, device=device).index_fill_(0, kept, False)
    assert torch.equal(cache_NCD[untouched], expected_cache[untouched])
    assert torch.equal(cache_NCD[kept, kv_heads:], expected_cache[kept, kv_heads:]), "values are copied, not computed"


def check_gumbel_argmax(device: str, num_seqs: int, vocab: int, dtype: torch.dtype) -> None:
    """Tokens equal the reference's; every fourth sequence is greedy, and forbidden tokens are never taken."""
    draw = Draw(num_seqs + vocab, device)
    logits_SV = 3 * draw.normal(num_seqs, vocab)
    logits_SV[:, ::3] = float("-inf")
    logits_SV = logits_SV.to(dtype)
    temperature_S = draw.normal(num_seqs).abs() + 0.1
    temperature_S[::4] = 0
    seed_S = draw.integers(2**62, num_seqs) - 2**61
    position_S = draw.integers(2**31, num_seqs)
    with poisoned():
        actual = gumbel_argmax(logits_SV, temperature_S, seed_S, position_S)
    assert torch.equal(actual, gumbel_argmax_reference(logits_SV, temperature_S, seed_S, position_S))
    assert torch.equal(actual[::4], logits_SV[::4].float().argmax(-1))
    assert not (actual % 3 == 0).any()


def check_fp8_rows(device: str, num_tokens: int, hidden: int, end: int, dtype: torch.dtype) -> None:
    """The kernels against plain torch, and what is left of the tokens."""
    x_TH = Draw(num_tokens + hidden, device).normal(num_tokens, hidden, dtype=dtype)
    if num_tokens > 1:
        x_TH[1, :BLOCK] = 0.0
    end_1 = torch.tensor([end], dtype=torch.int32, device=device)
    with poisoned():
        q_TH, scale_TB = quantize_rows(x_TH)
        back_TH = dequantize_rows(q_TH, scale_TB, end_1)
    expected_q_TH, expected_scale_TB = quantize_rows_reference(x_TH)
    assert_near(scale_TB, expected_scale_TB, torch.float32)
    # A quotient in the middle between two numbers may go either way: one step of 3 bits. The interpreter, which
    # rounds by hand, loses a carry into the exponent now and then.
    step, noise = (1 / 8, 0.04) if x_TH.is_cuda else (1 / 2, 0.1)
    q32_TH, expected_TH = q_TH.float(), expected_q_TH.float()
    assert ((q32_TH - expected_TH).abs() <= expected_TH.abs() * step + 2**-9).all()
    assert_near(back_TH[:end], dequantize_rows_reference(q_TH, scale_TB, end_1)[:end], torch.bfloat16)
    assert (back_TH[:end] - x_TH[:end]).float().norm() <= noise * x_TH[:end].float().norm()
