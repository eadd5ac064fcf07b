"""What is dense in a layer at decode sizes, without its attention: norm, query-key-value product, rotary embedding,
output product, norm, router product, gate, one after the other as in a step, with other weights in each layer.

Sizes of Qwen3-30B-A3B. ``library``: the same with torch's products. What must move is the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from measure import Row, row, time_graphs

from expertmesh.kernels.few_rows import TILING, Tiling, parts_of_product
from expertmesh.kernels.gate import Gate, SlotTables, route
from expertmesh.kernels.norm import add_rms_norm
from expertmesh.kernels.rope_append import rope_append

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 2048, 32, 4, 128, 128
LAYERS = 12
TOKENS = (1, 8, 32, 64, 128)
EPS = 1e-6
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Layer:
    norm_H: torch.Tensor
    qkv_CH: torch.Tensor
    qk_norm_CD: torch.Tensor
    o_HC: torch.Tensor
    router_EH: torch.Tensor
    cache_NKD: torch.Tensor


class Chain:
    """Layers that follow each other, for so many tokens."""

    def __init__(self, tokens: int) -> None:
        make = {"device": "cuda", "dtype": torch.bfloat16}
        heads = HEADS + 2 * KV_HEADS
        self._layers = [
            Layer(
                norm_H=torch.randn(HIDDEN, **make),
                qkv_CH=torch.randn(heads * HEAD_DIM, HIDDEN, **make) / HIDDEN**0.5,
                qk_norm_CD=torch.randn(HEADS + KV_HEADS, HEAD_DIM, **make),
                o_HC=torch.randn(HIDDEN, HEADS * HEAD_DIM, **make) / (HEADS * HEAD_DIM) ** 0.5,
                router_EH=torch.randn(EXPERTS, HIDDEN, **make) / HIDDEN**0.5,
                cache_NKD=torch.empty(2 * tokens, 2 * KV_HEADS, HEAD_DIM, **make),
            )
            for _ in range(LAYERS)
        ]
        angle = torch.randn(4096, HEAD_DIM // 2, device="cuda")
        self._turns = angle.cos(), angle.sin()
        self._position = torch.randint(4096, (tokens,), device="cuda", dtype=torch.int32)
        self._place = torch.randperm(2 * tokens, device="cuda")[:tokens].int()
        slot = torch.arange(EXPERTS, device="cuda", dtype=torch.int32)[:, None]
        node_R = torch.zeros(1, device="cuda", dtype=torch.int32)
        self._tables = SlotTables(replica_EW=slot, rank_EW=torch.zeros_like(slot), node_R=node_R)
        self._delta, self._residual = (torch.randn(tokens, HIDDEN, **make) for _ in range(2))

    def layer(self, layer: Layer, qkv: Product, o: Product, router: Product) -> None:
        normed = add_rms_norm(self._delta, self._residual, layer.norm_H, EPS)
        qkv_TC = qkv(normed, layer.qkv_CH)
        q_THD = rope_append(
            qkv_TC.view(*qkv_TC.shape[:-1], -1, HEAD_DIM), layer.qk_norm_CD, EPS, *self._turns, self._position,
            self._place, layer.cache_NKD[:, :KV_HEADS], layer.cache_NKD[:, KV_HEADS:],
        )  # fmt: skip
        out = o(q_THD.flatten(1), layer.o_HC)
        normed = add_rms_norm(out, self._residual, layer.norm_H, EPS)
        route(router(normed, layer.router_EH), Gate(top_k=8), self._tables)

    def calls(self, qkv: Product, o: Product, router: Product) -> list[Callable[[], object]]:
        return [lambda layer=layer: self.layer(layer, qkv, o, router) for layer in self._layers]

    @property
    def num_bytes(self) -> int:
        """Of a layer's weights."""
        return 2 * sum(w.numel() for w in (self._layers[0].qkv_CH, self._layers[0].o_HC, self._layers[0].router_EH))


def in_parts(tiling: Tiling) -> Product:
    return lambda x, weight: parts_of_product(x, weight, tiling)


def measure(limits: dict[str, float]) -> Iterator[Row]:
    for tokens in TOKENS:
        chain = Chain(tokens)
        own, library = in_parts(TILING), F.linear
        times = time_graphs({"parts": chain.calls(own, own, own), "library": chain.calls(library, library, library)})
        for name, microseconds in times.items():
            where = {"tokens": tokens, "products": name}
            yield row("dense_layer", where, microseconds, num_bytes=chain.num_bytes, operations=0, limits=limits)


def sweep(limits: dict[str, float]) -> Iterator[Row]:
    """One product's tiling at a time, the others as they are."""
    for tokens in (8, 32, 64):
        chain = Chain(tokens)
        own = in_parts(TILING)
        for which in ("qkv", "o", "router"):
            trials = [
                replace(TILING, columns=columns, depth=depth, stages=stages, warps=warps, programs_per_sm=share)
                for columns, depth, stages, warps in ((64, 128, 4, 4), (64, 128, 3, 4), (64, 64, 6, 4), (128, 64, 4, 4))
                for share in (0.25, 0.5, 1.0, 1.2, 2.0, 3.0)
            ]
            products = {trial: {"qkv": own, "o": own, "router": own, which: in_parts(trial)} for trial in trials}
            times = time_graphs({str(trial): chain.calls(**found) for trial, found in products.items()}, rounds=3)
            for name, microseconds in times.items():
                where = {"tokens": tokens, "product": which, "tiling": name}
                yield row("dense_layer", where, microseconds, num_bytes=chain.num_bytes, operations=0, limits=limits)
