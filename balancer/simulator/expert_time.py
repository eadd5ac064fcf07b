"""How long the experts of a step and its exchanges take, from routed tokens.

A step's tokens are drawn from tokens whose ranks are known: the fullest rank of each layer, the experts that it has to
read and the rows that it receives are counted, not estimated from means. Batches of growing size extend one another,
so that more tokens never take less time.

Dimensions: B tokens of a step, T routed tokens, K experts of a token, R expert ranks, N nodes, E experts, G sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.hardware import Hardware
from expertmesh.balancer.simulator.model_shape import ModelShape
from expertmesh.balancer.solver.topology import Topology

Ids = NDArray[np.integer]
Floats = NDArray[np.float64]
MAX_TOKENS = 1 << 17
"""Of a batch that is drawn; larger ones grow as the last two sizes do."""
DRAWN_TOKENS = 1 << 17
MAX_DRAWS = 8
"""Small batches are drawn so many times, large ones as often as ``DRAWN_TOKENS`` allow, at least once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """Where a step's tokens come from: token i from attention rank ``i % len(node_A)``. ``colocated``: attention rank
    a is expert rank a, and what stays on it is free."""

    node_A: NDArray[np.int64]
    colocated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTimes:
    """Of all MoE layers together, by tokens of a step: seconds [G] at ``tokens_G``, linear in between and beyond.

    Args:
        experts_s: the slowest rank of each layer.
        received_s, rdma_s: bytes that the busiest rank takes in from its own node, and from others.
        latency_s: of the exchanges.
        sent_token_s, sent_token_rdma_s: what each token of an attention rank costs that rank to send.
    """

    tokens_G: Floats
    experts_s: Floats
    received_s: Floats
    rdma_s: Floats
    latency_s: float
    sent_token_s: float
    sent_token_rdma_s: float

    def experts(self, tokens: float) -> float:
        """Seconds that the experts compute in a step of so many tokens."""
        return _at(tokens, self.tokens_G, self.experts_s)

    def exchange(self, tokens: float, busiest: float) -> float:
        """Seconds of dispatch and combine; ``busiest``: the most tokens that one attention rank brings."""
        inside = max(_at(tokens, self.tokens_G, self.received_s), busiest * self.sent_token_s)
        between = max(_at(tokens, self.tokens_G, self.rdma_s), busiest * self.sent_token_rdma_s)
        return self.latency_s + inside + between


def _at(tokens: float, tokens_G: Floats, seconds_G: Floats) -> float:
    if tokens <= tokens_G[-1] or len(tokens_G) == 1:
        return float(np.interp(tokens, tokens_G, seconds_G))
    slope = (seconds_G[-1] - seconds_G[-2]) / (tokens_G[-1] - tokens_G[-2])
    return float(seconds_G[-1] + slope * (tokens - tokens_G[-1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedLayer:
    """Tokens of one layer: the experts that they choose and the ranks that they go to for them; -1 = none."""

    expert_TK: Ids
    rank_TK: Ids


def measure(
    layers: list[RoutedLayer],
    topology: Topology,
    origins: Origins,
    shape: ModelShape,
    hardware: Hardware,
    max_tokens: int,
    seed: int = 0,
) -> ExpertTimes:
    """Times of steps up to ``max_tokens`` tokens; ``layers`` stand for all MoE layers of the model in equal parts."""
    tokens_G = _sizes(min(max_tokens, MAX_TOKENS))
    rng = np.random.default_rng(seed)
    repeats = shape.num_moe_layers / len(layers)
    experts_G, received_G, rdma_G = (np.zeros(len(tokens_G)) for _ in range(3))
    sent = sent_rdma = 0.0
    for layer in layers:
        counted = _Counted(layer, topology, origins, shape.num_experts)
        times = counted.average_times(tokens_G, shape, hardware, rng)
        experts_G += repeats * times[0]
        received_G += repeats * times[1]
        rdma_G += repeats * times[2]
        inside, between = counted.visits_a_token()
        sent += repeats * inside * _exchange_s(shape, hardware)
        sent_rdma += repeats * between * _rdma_s(shape, hardware)
    is_alone = origins.colocated and topology.num_ranks == 1
    latency_us = 0.0 if is_alone else hardware.exchange_us + (hardware.rdma_us if topology.num_nodes > 1 else 0.0)
    return ExpertTimes(
        tokens_G=tokens_G.astype(np.float64),
        experts_s=experts_G,
        received_s=received_G,
        rdma_s=rdma_G,
        latency_s=shape.num_moe_layers * latency_us * 1e-6,
        sent_token_s=sent,
        sent_token_rdma_s=sent_rdma,
    )


def _sizes(largest: int) -> NDArray[np.int64]:
    powers = 2 ** np.arange(max(largest - 1, 1).bit_length() + 1)
    return np.unique(np.minimum(powers, largest))


def _exchange_s(shape: ModelShape, hardware: Hardware) -> float:
    """Of one row there and back."""
    return 2 * shape.row_bytes / (hardware.exchange_gb_per_s * 1e9)


def _rdma_s(shape: ModelShape, hardware: Hardware) -> float:
    return 2 * shape.row_bytes / (hardware.rdma_gb_per_s * 1e9)


class _Counted:
    """One layer's tokens, prepared for counting batches of them."""

    def __init__(self, layer: RoutedLayer, topology: Topology, origins: Origins, num_experts: int) -> None:
        self._topology = topology
        self._origins = origins
        self._num_experts = num_experts
        self._chosen_TK = layer.rank_TK >= 0
        self._replica_TK = np.where(self._chosen_TK, layer.rank_TK * num_experts + layer.expert_TK, -1)
        self._rank_TK = _once(layer.rank_TK)
        node_TK = np.where(self._chosen_TK, topology.node_R[layer.rank_TK], -1)
        self._node_TK = _once(node_TK)

    def visits_a_token(self) -> tuple[float, float]:
        """Ranks that a token is sent to, and nodes beside its own, averaged over tokens from everywhere."""
        tokens = np.arange(max(len(self._rank_TK), len(self._origins.node_A)))
        ranks_K, nodes_K = self._visits(tokens % len(self._rank_TK), tokens)
        return len(ranks_K) / len(tokens), len(nodes_K) / len(tokens)

    def average_times(
        self, tokens_G: NDArray[np.int64], shape: ModelShape, hardware: Hardware, rng: np.random.Generator
    ) -> Floats:
        """Seconds [3, G]: experts, received inside nodes, received from other nodes. Every size has its own number of
        draws, and each draw of a size goes on from the smaller ones."""
        draws_G = np.clip(DRAWN_TOKENS // tokens_G, 1, MAX_DRAWS)
        times_3G = np.zeros((3, len(tokens_G)))
        for draw in range(int(draws_G.max())):
            used = int((draws_G > draw).sum())
            drawn = rng.integers(0, len(self._rank_TK), int(tokens_G[used - 1]))
            times_3G[:, :used] += self._growing(drawn, tokens_G[:used], shape, hardware)
        mean_3G: Floats = np.maximum.accumulate(times_3G / draws_G, axis=1)
        return mean_3G

    def _growing(
        self, drawn: NDArray[np.int64], tokens_G: NDArray[np.int64], shape: ModelShape, hardware: Hardware
    ) -> Floats:
        topology = self._topology
        rows_Q = np.zeros(topology.num_ranks * self._num_experts, np.int64)
        received_R = np.zeros(topology.num_ranks, np.int64)
        received_N = np.zeros(topology.num_nodes, np.int64)
        ranks_of_N = np.bincount(topology.node_R, minlength=topology.num_nodes)
        times_3G = np.empty((3, len(tokens_G)))
        start = 0
        for size, end in enumerate(tokens_G):
            part = drawn[start:end]
            replicas = self._replica_TK[part].ravel()
            rows_Q += np.bincount(replicas[replicas >= 0], minlength=len(rows_Q))
            ranks_V, nodes_V = self._visits(part, np.arange(start, end))
            received_R += np.bincount(ranks_V, minlength=len(received_R))
            received_N += np.bincount(nodes_V, minlength=len(received_N))
            rows_RE = rows_Q.reshape(topology.num_ranks, -1)
            read_R = (rows_RE > 0).sum(axis=1) * shape.expert_bytes / (hardware.expert_read_tb_per_s * 1e12)
            computed_R = rows_RE.sum(axis=1) * 2 * shape.expert_params / (hardware.matmul_tflop_per_s * 1e12)
            times_3G[0, size] = np.maximum(read_R, computed_R).max()
            times_3G[1, size] = received_R.max() * _exchange_s(shape, hardware)
            times_3G[2, size] = (received_N / ranks_of_N).max() * _rdma_s(shape, hardware)
            start = end
        return times_3G

    def _visits(self, token_B: NDArray[np.int64], number_B: NDArray[np.int64]) -> tuple[Ids, Ids]:
        """Every (token, rank) that goes over a link of a node, and every (token, node) that goes over the network, by
        rank and by node; ``number_B`` says which attention rank a token comes from."""
        attention_B = number_B % len(self._origins.node_A)
        rank_BK, node_BK = self._rank_TK[token_B], self._node_TK[token_B]
        counts_BK = rank_BK >= 0
        if self._origins.colocated:
            counts_BK &= rank_BK != attention_B[:, None]
        away_BK = (node_BK >= 0) & (node_BK != self._origins.node_A[attention_B][:, None])
        return rank_BK[counts_BK], node_BK[away_BK]


def _once(group_TK: Ids) -> Ids:
    """Each token's groups, every one once, the other places -1."""
    ordered_TK = np.sort(group_TK, axis=1)
    again_TK = np.zeros(ordered_TK.shape, np.bool_)
    again_TK[:, 1:] = ordered_TK[:, 1:] == ordered_TK[:, :-1]
    return np.where(again_TK, -1, ordered_TK)
