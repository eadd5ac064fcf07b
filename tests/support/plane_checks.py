"""Exchanges of a device plane against a plain sum over experts, run in every rank by ``gpu_ranks``.

All ranks draw the tokens of all of them from the same seed, so that each knows what it has to receive.
Dimensions: as in ``mesh.dataplane.base``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from expertmesh.mesh.dataplane.base import Dispatched, Exchange, PlaneShape
from support.gpu_ranks import PlaneConfig, Rank, plane_of

BF16_NOISE = 6e-3
"""Relative error: products and two sums are rounded to 8 bits."""

FP8_NOISE = 4e-2


@dataclass(frozen=True)
class Layout:
    """Roles by rank: 'a', 'e' or 'b'."""

    roles: str
    slots_per_rank: int
    hidden_size: int
    top_k: int
    max_num_tokens: int = 4096

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, role in enumerate(self.roles) if role in "eb")

    @property
    def num_slots(self) -> int:
        return self.slots_per_rank * len(self.expert_ranks)

    def shape(self, rank: int) -> PlaneShape:
        return PlaneShape(
            rank=rank,
            size=len(self.roles),
            expert_ranks=self.expert_ranks,
            slots_per_rank=self.slots_per_rank,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            dtype=torch.bfloat16,
            max_num_tokens=self.max_num_tokens,
        )

    def tokens(self, *counts: int) -> list[int]:
        """By rank; a rank without an attention half has none."""
        return [count if role in "ab" else 0 for role, count in zip(self.roles, counts, strict=True)]


@dataclass(frozen=True)
class Batch:
    """The tokens of one rank."""

    x_TH: torch.Tensor
    slot_TK: torch.Tensor
    weight_TK: torch.Tensor

    def copy_(self, other: Batch) -> None:
        self.x_TH.copy_(other.x_TH)
        self.slot_TK.copy_(other.slot_TK)
        self.weight_TK.copy_(other.weight_TK)


def draw(layout: Layout, num_tokens: int, seed: int, device: torch.device, routing: str) -> Batch:
    """``routing``: ``any`` = distinct slots, a tenth of the choices nowhere; ``one`` = all tokens to the last slot and
    to nothing else; ``none`` = nowhere.
    """
    generator = torch.Generator(device).manual_seed(seed)
    kind: dict[str, Any] = {"generator": generator, "device": device}
    x_TH = torch.randn(num_tokens, layout.hidden_size, **kind).to(torch.bfloat16)
    weight_TK = torch.rand(num_tokens, layout.top_k, **kind)
    slot_TK = torch.rand(num_tokens, layout.num_slots, **kind).topk(layout.top_k, dim=1).indices
    if routing == "any":
        slot_TK = slot_TK.masked_fill(torch.rand(num_tokens, layout.top_k, **kind) < 0.1, -1)
    else:
        slot_TK = torch.full_like(slot_TK, -1)
        if routing == "one":
            slot_TK[:, layout.top_k // 2] = layout.num_slots - 1
    return Batch(x_TH, slot_TK, weight_TK)


def factor(slot: torch.Tensor) -> torch.Tensor:
    """What the expert of a slot multiplies by; neighbours differ much."""
    return 0.25 + (slot * 37 % 64).float() / 32


def experts(arrived: Dispatched[Any], first_slot: int) -> torch.Tensor:
    """The experts of a rank, without knowing the counts on the host; NaN in rows of no slot."""
    rows_NH, ends_S = arrived.rows_NH, arrived.counts_S.long().cumsum(0)
    n_N = torch.arange(len(rows_NH), device=rows_NH.device)
    slot_N = torch.searchsorted(ends_S, n_N, right=True)
    y_NH = rows_NH.float() * factor(slot_N + first_slot)[:, None]
    if arrived.factor_N is not None:
        y_NH = y_NH * arrived.factor_N[:, None]
    return y_NH.to(rows_NH.dtype).masked_fill((n_N >= ends_S[-1])[:, None], float("nan"))


def round_trip(plane: Any, layout: Layout, rank: int, batch: Batch, tokens: Sequence[int]) -> tuple[torch.Tensor, Any]:
    exchange = Exchange(layer=0, version=1, tokens=tokens, capacity=max(tokens))
    arrived = plane.dispatch(batch.x_TH, batch.slot_TK, batch.weight_TK, exchange).wait()
    y_NH = arrived.rows_NH
    if rank in layout.expert_ranks:
        y_NH = experts(arrived, layout.expert_ranks.index(rank) * layout.slots_per_rank)
    else:
        assert not len(y_NH), "a rank without slots receives no rows"
    return plane.combine(y_NH, arrived.handle).wait(), arrived.counts_S


def expected(batch: Batch) -> torch.Tensor:
    """The sum in float32 of products that are rounded as an expert's are."""
    total_TH = torch.zeros(batch.x_TH.shape, device=batch.x_TH.device)
    for k in range(batch.slot_TK.shape[1]):
        slot_T = batch.slot_TK[:, k]
        y_TH = (batch.x_TH.float() * factor(slot_T)[:, None]).to(torch.bfloat16).float()
        total_TH += y_TH * (batch.weight_TK[:, k] * (slot_T >= 0))[:, None]
    return total_TH


def assert_whole(
    layout: Layout, rank: int, batches: list[Batch], out_TH: torch.Tensor, counts_S: torch.Tensor, noise: float
) -> None:
    own = batches[rank]
    total_TH = expected(own)
    assert out_TH.shape == total_TH.shape
    error = float((out_TH.float() - total_TH).norm() / total_TH.norm().clamp(min=1e-6))
    assert error <= noise, f"relative error {error:.2g} at T = {len(total_TH)}"
    is_nowhere_T = (own.slot_TK < 0).all(1)
    assert not out_TH[is_nowhere_T].any(), "a token that went nowhere is not 0"
    if rank in layout.expert_ranks:
        first = layout.expert_ranks.index(rank) * layout.slots_per_rank
        slots = torch.cat([batch.slot_TK.flatten() for batch in batches])
        found_S = torch.bincount(slots[slots >= first] - first, minlength=layout.slots_per_rank)
        assert torch.equal(counts_S.long(), found_S[: layout.slots_per_rank]), "rows of each slot"


def check_exchanges(rank: Rank, config: PlaneConfig, layout: Layout, cases: Sequence[tuple[Sequence[int], str]]) -> int:
    """One exchange after another; (tokens by rank, routing) of each."""
    plane = plane_of(rank, config, layout.shape(rank.rank))
    noise = FP8_NOISE if config.fp8_dispatch else BF16_NOISE
    for seed, (counts, routing) in enumerate(cases):
        tokens = layout.tokens(*counts)
        batches = [draw(layout, count, 1000 * seed + r, rank.device, routing) for r, count in enumerate(tokens)]
        out_TH, counts_S = round_trip(plane, layout, rank.rank, batches[rank.rank], tokens)
        plane.check()
        try:
            assert_whole(layout, rank.rank, batches, out_TH, counts_S, noise)
        except AssertionError as error:
            raise AssertionError(f"tokens {tokens}, routing {routing}: {error}") from error
    return len(cases)


def check_graph(rank: Rank, config: PlaneConfig, layout: Layout, counts: Sequence[int]) -> int:
    """A captured exchange, replayed with other tokens and other routing, padding included."""
    plane = plane_of(rank, config, layout.shape(rank.rank))
    tokens = layout.tokens(*counts)
    static = draw(layout, tokens[rank.rank], 7, rank.device, "any")
    round_trip(plane, layout, rank.rank, static, tokens)
    plane.check()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out_TH, counts_S = round_trip(plane, layout, rank.rank, static, tokens)
    replays = 0
    for seed, routing in enumerate(("any", "one", "none", "any")):
        batches = [draw(layout, count, 77 * seed + r, rank.device, routing) for r, count in enumerate(tokens)]
        for batch in batches:
            batch.slot_TK[len(batch.slot_TK) // 2 :][:seed] = -1  # padding
        static.copy_(batches[rank.rank])
        graph.replay()
        plane.check()
        assert_whole(layout, rank.rank, batches, out_TH, counts_S, BF16_NOISE)
        replays += 1
    return replays


def check_overlap(rank: Rank, config: PlaneConfig, layout: Layout, counts: Sequence[int]) -> None:
    """Two exchanges under way at once, as micro-batches in turns have them."""
    plane = plane_of(rank, config, layout.shape(rank.rank))
    tokens = layout.tokens(*counts)
    exchange = Exchange(layer=0, version=1, tokens=tokens, capacity=max(tokens))
    batches = [[draw(layout, c, 10 * half + r, rank.device, "any") for r, c in enumerate(tokens)] for half in range(2)]
    own = [half[rank.rank] for half in batches]
    arriving = [plane.dispatch(b.x_TH, b.slot_TK, b.weight_TK, exchange) for b in own]
    returning, found = [], []
    first = layout.expert_ranks.index(rank.rank) * layout.slots_per_rank if rank.rank in layout.expert_ranks else None
    for pending in arriving:
        arrived = pending.wait()
        y_NH = arrived.rows_NH if first is None else experts(arrived, first)
        found.append(arrived.counts_S)
        returning.append(plane.combine(y_NH, arrived.handle))
    outs = [pending.wait() for pending in returning]
    plane.check()
    for half, out_TH, counts_S in zip(batches, outs, found, strict=True):
        assert_whole(layout, rank.rank, half, out_TH, counts_S, BF16_NOISE)
