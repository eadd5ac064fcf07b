"""Paged prefill attention: measured against its floor, and torch's varlen attention over contiguous keys.

The heads of Qwen3-30B-A3B: 32 query heads, 4 KV heads of 128, blocks of 16 positions, tables in random order. A step
has ``sequences`` chunks of ``tokens`` tokens, each behind ``prefix`` cached ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from measure import Row, compile_all, compile_only, row, time_graph, time_graphs
from torch.nn.attention.varlen import varlen_attn

from expertmesh.kernels import paged_prefill as kernel_module
from expertmesh.kernels.paged_prefill import (
    TUNING,
    Tuning,
    paged_prefill_attention,
    paged_prefill_attention_reference,
    prefill_pieces,
    queries_a_piece,
)

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 4, 128, 16
_LAYERS = 4
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Case:
    sequences: int
    prefix: int
    tokens: int


CASES = (Case(64, 0, 128), Case(16, 0, 512), Case(8, 0, 1024), Case(2, 0, 1024), Case(1, 0, 8192), Case(8, 3072, 1024),
         Case(1, 31_744, 1024), Case(100, 0, 81), Case(32, 1000, 17))  # fmt: skip


class Inputs:
    """Caches of some layers that take turns, and the rest once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        length = case.prefix + case.tokens
        blocks_a_seq = -(-length // BLOCK_SIZE)
        num_blocks = case.sequences * blocks_a_seq
        make = {"device": "cuda", "dtype": torch.bfloat16}
        self.caches = [torch.randn(num_blocks, BLOCK_SIZE, 2 * KV_HEADS, HEAD_DIM, **make) for _ in range(_LAYERS)]
        self.blocks = torch.randperm(num_blocks, device="cuda").view(case.sequences, blocks_a_seq).to(torch.int32)
        self.q = torch.randn(case.sequences * case.tokens, HEADS, HEAD_DIM, **make)
        self.out = torch.empty_like(self.q)
        seen = case.tokens * case.prefix + case.tokens * (case.tokens + 1) // 2
        self.operations = 4 * HEADS * HEAD_DIM * case.sequences * seen
        self.bytes = 2 * self.q.numel() * 2 + case.sequences * length * 2 * KV_HEADS * HEAD_DIM * 2

    def pieces(self, tuning: Tuning) -> torch.Tensor:
        counts, starts = (np.full(self.case.sequences, size) for size in (self.case.tokens, self.case.prefix))
        return torch.from_numpy(prefill_pieces(counts, starts, queries_a_piece(HEADS, KV_HEADS, tuning))).cuda()

    def call(self, cache: torch.Tensor, pieces: torch.Tensor, tuning: Tuning) -> None:
        key, value = cache[:, :, :KV_HEADS], cache[:, :, KV_HEADS:]
        paged_prefill_attention(self.q, key, value, self.blocks, pieces, self.out, tuning=tuning)

    def calls(self, tuning: Tuning) -> list[Callable[[], None]]:
        pieces = self.pieces(tuning)
        return [partial(self.call, cache, pieces, tuning) for cache in self.caches]

    def error(self, tuning: Tuning) -> float:
        """Of the first layer, relative to the reference."""
        pieces = self.pieces(tuning)
        self.out.fill_(float("nan"))
        self.call(self.caches[0], pieces, tuning)
        key, value = self.caches[0][:, :, :KV_HEADS], self.caches[0][:, :, KV_HEADS:]
        expected = paged_prefill_attention_reference(self.q, key, value, self.blocks, pieces).float()
        return ((self.out.float() - expected).norm() / expected.norm()).item()

    def library_calls(self) -> list[Callable[[], object]]:
        """torch's varlen attention; keys and values lie contiguous before it begins, once for each query head."""
        ends = [
            torch.arange(self.case.sequences + 1, device="cuda", dtype=torch.int32) * size
            for size in (self.case.tokens, self.case.prefix + self.case.tokens)
        ]
        found: list[Callable[[], object]] = []
        for cache in self.caches[:2]:
            rows = cache[self.blocks.long()].flatten(1, 2)[:, : self.case.prefix + self.case.tokens].flatten(0, 1)
            key, value = (part.repeat_interleave(HEADS // KV_HEADS, 1).contiguous() for part in rows.split(KV_HEADS, 1))
            sizes = (self.case.tokens, self.case.prefix + self.case.tokens)
            found.append(partial(varlen_attn, self.q, key, value, *ends, *sizes, **_causal()))
        return found


def _causal() -> dict[str, object]:
    """The argument has changed its name between torch 2.11 and 2.13."""
    import inspect

    return (
        {"window_size": (-1, 0)} if "window_size" in inspect.signature(varlen_attn).parameters else {"is_causal": True}
    )


def measure(limits: dict[str, float]) -> Iterator[Row]:
    for case in CASES:
        torch.cuda.empty_cache()
        inputs = Inputs(case)
        alternatives = {"paged_prefill": inputs.calls(TUNING)}
        if case.sequences * case.tokens * (case.prefix + case.tokens) < 2**36:
            alternatives["varlen_attn of torch, contiguous"] = inputs.library_calls()
        for name, microseconds in time_graphs(alternatives).items():
            yield row(name, asdict(case), microseconds, num_bytes=inputs.bytes, operations=inputs.operations,
                      limits=limits)  # fmt: skip


TUNINGS = tuple(
    Tuning(*numbers)
    for numbers in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2, 128), (128, 32, 8, 3, 128), (128, 128, 8, 2),
                    (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2, 168), (64, 32, 4, 3, 168), (64, 128, 4, 2),
                    (128, 32, 4, 3), (128, 64, 4, 2), (256, 64, 8, 2))
)  # fmt: skip


def _compile(tuning: Tuning) -> None:
    inputs = Inputs(Case(2, 0, 64))
    with compile_only(kernel_module, "_paged_prefill_kernel"):
        inputs.call(inputs.caches[0], inputs.pieces(tuning), tuning)


def sweep(limits: dict[str, float]) -> Iterator[Row]:
    problems = compile_all(_compile, TUNINGS)
    for case in CASES[:1] + CASES[2:3] + CASES[4:6] + CASES[8:]:
        torch.cuda.empty_cache()
        inputs = Inputs(case)
        floor = max(inputs.bytes / limits["read"], inputs.operations / limits["bf16_matmul"]) * 1e6
        for tuning in TUNINGS:
            if problems[tuning]:
                print("cannot compile", tuning, problems[tuning])
                continue
            error = inputs.error(tuning) if case.sequences > 1 else 0.0
            if not error < _TOLERANCE:
                print("WRONG", case, tuning, error)
                continue
            microseconds = time_graph(inputs.calls(tuning), budget_ms=6)
            yield {"sweep": "paged_prefill", **asdict(case), "us": round(microseconds, 2),
                   "fraction": round(floor / microseconds, 3), **asdict(tuning)}  # fmt: skip
