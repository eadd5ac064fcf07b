"""The small kernels of a decode step: gate, add + RMS norm, QK-norm + RoPE + KV append, sampler.

Sizes of Qwen3-30B-A3B, and DeepSeek-V3's gate and hidden size. Inputs take turns past the L2 cache where they are large
enough to; at the sizes of a decode step these kernels are a launch each, and what they touch comes from the L2 cache in
a real step too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from measure import Row, row, time_graph

from expertmesh.kernels.gate import Gate, ReplicaPrices, RoutingTotals, SlotTables, route
from expertmesh.kernels.norm import add_rms_norm
from expertmesh.kernels.rope_append import rope_append
from expertmesh.kernels.sampler import gumbel_argmax

HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 4, 128, 151_936
_ROTATED_BYTES = 200 << 20


def measure(limits: dict[str, float]) -> Iterator[Row]:
    for tokens in (1, 64, 256, 4096):
        for hidden in (2048, 7168):
            yield _norm(tokens, hidden, limits)
        yield _rope(tokens, limits)
        for replicas in (1, 2):
            yield _gate(tokens, Gate(top_k=8), 128, 8, replicas, limits)
        yield _gate(tokens, Gate(top_k=8, scoring="sigmoid", num_groups=8, top_groups=4, scale=2.5), 256, 32, 2, limits)
    for sequences in (1, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            yield _sampler(sequences, dtype, limits)


def _sets(num_bytes: int) -> range:
    return range(max(2, min(32, -(-_ROTATED_BYTES // num_bytes))))


def _norm(tokens: int, hidden: int, limits: dict[str, float]) -> Row:
    moved = 4 * tokens * hidden * 2
    make = {"device": "cuda", "dtype": torch.bfloat16}
    weight = torch.randn(hidden, **make)
    sets = [(torch.randn(tokens, hidden, **make), torch.randn(tokens, hidden, **make)) for _ in _sets(moved)]
    # The residual grows with every replay, to no harm: bfloat16 has float32's range.
    microseconds = time_graph([lambda s=s: add_rms_norm(*s, weight, 1e-6) for s in sets])
    where = {"tokens": tokens, "hidden": hidden}
    return row("add_rms_norm", where, microseconds, num_bytes=moved, operations=0, limits=limits)


def _rope(tokens: int, limits: dict[str, float]) -> Row:
    moved = 2 * tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM * 2
    make = {"device": "cuda", "dtype": torch.bfloat16}
    norm = torch.randn(HEADS + KV_HEADS, HEAD_DIM, **make)
    angle = torch.randn(4096, HEAD_DIM // 2, device="cuda")
    cos, sin = angle.cos(), angle.sin()
    position = torch.randint(4096, (tokens,), device="cuda", dtype=torch.int32)
    place = torch.randperm(2 * tokens, device="cuda")[:tokens]
    sets = [
        (
            torch.randn(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM, **make),
            torch.empty(2 * tokens, 2 * KV_HEADS, HEAD_DIM, **make),
        )
        for _ in _sets(moved)
    ]
    calls = [
        lambda qkv=qkv, cache=cache: rope_append(
            qkv, norm, 1e-6, cos, sin, position, place, cache[:, :KV_HEADS], cache[:, KV_HEADS:]
        )
        for qkv, cache in sets
    ]
    return row("rope_append", {"tokens": tokens}, time_graph(calls), num_bytes=moved, operations=0, limits=limits)


def _gate(tokens: int, gate: Gate, experts: int, ranks: int, replicas: int, limits: dict[str, float]) -> Row:
    slots = experts * replicas
    replica = torch.randperm(slots, device="cuda").view(experts, replicas).to(torch.int32)
    tables = SlotTables(
        replica_EW=replica,
        rank_EW=replica // -(-slots // ranks),
        node_R=torch.arange(ranks, device="cuda", dtype=torch.int32) // 8,
    )
    prices = ReplicaPrices.equal(ranks, "cuda") if replicas > 1 else None
    totals = RoutingTotals(
        pairs_EE=torch.zeros(experts, experts, device="cuda", dtype=torch.int64),
        slot_load_G=torch.zeros(slots, device="cuda", dtype=torch.int64),
        visits=torch.zeros(2, device="cuda", dtype=torch.int64),
    )
    logits = [torch.randn(tokens, experts, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    bias = torch.randn(experts, device="cuda") if gate.scoring == "sigmoid" else None
    microseconds = time_graph(
        [lambda x=x: route(x, gate, tables, bias_E=bias, prices=prices, totals=totals) for x in logits]
    )
    moved = tokens * (experts * 2 + gate.top_k * (4 + 8 + 8))
    where = {"tokens": tokens, "scoring": gate.scoring, "experts": experts, "ranks": ranks, "replicas": replicas}
    return row("route", where, microseconds, num_bytes=moved, operations=0, limits=limits)


def _sampler(sequences: int, dtype: torch.dtype, limits: dict[str, float]) -> Row:
    moved = sequences * VOCAB * dtype.itemsize
    logits = [torch.randn(sequences, VOCAB, device="cuda", dtype=dtype) for _ in _sets(moved)]
    temperature = torch.full((sequences,), 0.8, device="cuda")
    seed = torch.randint(2**62, (sequences,), device="cuda")
    position = torch.arange(sequences, device="cuda")
    microseconds = time_graph([lambda x=x: gumbel_argmax(x, temperature, seed, position) for x in logits])
    where = {"sequences": sequences, "vocabulary": VOCAB, "logits": str(dtype).removeprefix("torch.")}
    return row("gumbel_argmax", where, microseconds, num_bytes=moved, operations=0, limits=limits)
