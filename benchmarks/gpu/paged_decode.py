"""Paged decode attention: measured against reading the keys and values once.

The heads of Qwen3-30B-A3B: 32 query heads, 4 KV heads of 128, blocks of 16 positions, tables in random order. Caches of
several layers take turns, so that nothing is found in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product

import torch
from measure import Row, compile_all, compile_only, row, time_graph

from expertmesh.kernels import paged_decode as kernel_module
from expertmesh.kernels.paged_decode import DecodePlan, Tuning, paged_decode_attention

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
CASES = ((1, 1024), (1, 65536), (8, 8192), (16, 4096), (64, 256), (64, 1024), (128, 512), (256, 256), (256, 1024),
         (64, 4096), (256, 4096))  # fmt: skip
_ROTATED_BYTES = 400 << 20


class Inputs:
    """Enough caches for a batch and context, and one set of the rest; contexts vary by a quarter around the mean."""

    def __init__(self, batch: int, context: int, *, equal: bool, heads_first: bool = False) -> None:
        self.batch, self.heads_first = batch, heads_first
        spread = torch.zeros(batch) if equal or batch == 1 else torch.linspace(-0.25, 0.25, batch)
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
        self.lengths = (context * (1 + spread[order])).int().cuda()
        blocks_a_seq = -(-int(self.lengths.max()) // BLOCK_SIZE)
        num_blocks = batch * blocks_a_seq
        self.bytes = int(self.lengths.sum()) * 2 * KV_HEADS * HEAD_DIM * 2
        layers = max(2, min(16, -(-_ROTATED_BYTES // self.bytes)))
        middle = (2 * KV_HEADS, BLOCK_SIZE) if heads_first else (BLOCK_SIZE, 2 * KV_HEADS)
        self.caches = [
            torch.randn(num_blocks, *middle, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(layers)
        ]
        self.blocks = torch.randperm(num_blocks, device="cuda").view(batch, blocks_a_seq).to(torch.int32)
        self.q = torch.randn(batch, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def plan(self, tuning: Tuning | None) -> DecodePlan:
        plan = DecodePlan(
            max_seqs=self.batch,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            device=self.q.device,
            tuning=tuning,
        )
        plan.update(self.lengths)
        return plan

    def call(self, cache: torch.Tensor, plan: DecodePlan) -> torch.Tensor:
        if self.heads_first:
            cache = cache.transpose(1, 2)
        key, value = cache[:, :, :KV_HEADS], cache[:, :, KV_HEADS:]
        return paged_decode_attention(self.q, key, value, self.blocks, self.lengths, plan=plan, plan_is_old=True)

    def time(self, tuning: Tuning | None, *, budget_ms: float = 12.0) -> float:
        plan = self.plan(tuning)
        return time_graph([partial(self.call, cache, plan) for cache in self.caches], budget_ms=budget_ms)


def measure(limits: dict[str, float]) -> Iterator[Row]:
    for (batch, context), equal, heads_first in product(CASES, (True, False), (False, True)):
        if not equal and batch == 1:
            continue
        inputs = Inputs(batch, context, equal=equal, heads_first=heads_first)
        moved = inputs.bytes + 2 * inputs.q.numel() * 2
        operations = inputs.bytes / 2 / KV_HEADS * HEADS * 2
        where = {"batch": batch, "context": context, "lengths": "equal" if equal else "±25 %",
                 "block": "head, position" if heads_first else "position, head"}  # fmt: skip
        yield row("paged_decode", where, inputs.time(None), num_bytes=moved, operations=operations, limits=limits)


def _compile(job: tuple[int, ...]) -> None:
    inputs = Inputs(2, 64, equal=True)
    with compile_only(kernel_module, "paged_decode_kernel"):
        inputs.call(inputs.caches[0], inputs.plan(Tuning(4, *job)))


def sweep(limits: dict[str, float]) -> Iterator[Row]:
    tunings: list[tuple[int, ...]]
    tunings = [
        (128, 4, 2, 0, False),
        (64, 2, 2, 256),
        (32, 2, 3),
        (64, 4, 2),
        (64, 4, 3),
        (64, 4, 4),
        (64, 2, 2),
        (128, 4, 1),
        (128, 4, 2),
        (128, 8, 2),
    ]
    compile_all(_compile, tunings)
    for (batch, context), equal in (((1, 65536), True), ((8, 8192), True), ((64, 256), True), ((64, 1024), True),
                                    ((64, 1024), False), ((256, 1024), True), ((64, 4096), False)):  # fmt: skip
        inputs = Inputs(batch, context, equal=equal)
        floor = inputs.bytes / limits["read"] * 1e6
        for numbers, a_sm in product(tunings, (2, 3, 4)):
            microseconds = inputs.time(Tuning(a_sm, *numbers), budget_ms=4)
            yield {"sweep": "paged_decode", "batch": batch, "context": context, "equal": equal,
                   "us": round(microseconds, 2), "fraction": round(floor / microseconds, 3),
                   **asdict(Tuning(a_sm, *numbers))}  # fmt: skip
