"""The routing statistics of the mesh: what the attention halves report, merged and decayed.

Dimensions: E experts of a layer, G global slots. Pure: tokens are the only clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.policy import Floats, LayerStatistics
from expertmesh.v1 import mesh_pb2

_FORGOTTEN_TOKENS = 0.5  # a source with less than this left is dropped


@dataclass(frozen=True, kw_only=True, slots=True)
class Visits:
    """Where the tokens of a layer went while it had this placement ``version`` in this view; decayed.

    ``rank_visits`` and ``node_visits`` are sums over ``tokens``; ``slot_load_G`` rows sent to each slot.
    """

    view_number: int
    version: int
    tokens: float
    rank_visits: float
    node_visits: float
    slot_load_G: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCounts:
    """A snapshot of one layer; its arrays are its own.

    ``load_E``: times chosen; ``coactivation_EE``: tokens that chose both, symmetric, diagonal 0; ``tokens``: decayed;
    ``seen``: without decay; ``sources``: server id → its part of the load.
    """

    load_E: Floats
    coactivation_EE: Floats
    tokens: float
    seen: int
    visits: Visits
    sources: dict[str, Floats]


@dataclass(slots=True)
class _Source:
    load_E: Floats
    tokens: float = 0.0


@dataclass(slots=True)
class _Layer:
    load_E: Floats
    pairs_P: Floats  # as reported: i < j by rows
    visits: Visits
    tokens: float = 0.0
    seen: int = 0
    sources: dict[str, _Source] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """One layer's counts of a report, as arrays."""

    load_E: Floats
    pairs_P: Floats
    tokens: int
    visits: Visits


class Statistics:
    """Merges reports. A token's weight halves over ``half_life_tokens`` later ones of its layer, whoever reports them:
    so what a source that is silent or gone has reported fades as the others go on.
    """

    def __init__(self, half_life_tokens: int) -> None:
        self._half_life = float(half_life_tokens)
        self._layers: dict[int, _Layer] = {}
        self._num_experts = 0
        self._sequences: dict[str, tuple[str, int]] = {}
        self.version = 0
        """Grows with every report that counts."""

    def merge(self, server_id: str, incarnation: str, report: mesh_pb2.StatsReport, model: mesh_pb2.ModelShape) -> bool:
        """Count a report; False when it has come before.

        Raises:
            ValueError: it is not of this model; nothing of it was counted.
        """
        known, last = self._sequences.get(server_id, ("", 0))
        if known == incarnation and report.sequence <= last:
            return False
        parsed = {layer.layer: _parse(layer, report.view_number, model) for layer in report.layers}
        if model.num_experts != self._num_experts or not self._layers.keys() <= set(model.moe_layers):
            self._layers.clear()
            self._num_experts = model.num_experts
        self._sequences[server_id] = incarnation, report.sequence
        for layer, counts in parsed.items():
            self._add(self._layers.get(layer) or self._new_layer(layer, counts), server_id, counts)
        self.version += 1
        return True

    def layer(self, layer: int) -> LayerCounts | None:
        """A snapshot; None while nothing was counted."""
        counts = self._layers.get(layer)
        if counts is None:
            return None
        return LayerCounts(
            load_E=counts.load_E.copy(),
            coactivation_EE=self._square(counts.pairs_P),
            tokens=counts.tokens,
            seen=counts.seen,
            visits=counts.visits,
            sources={server_id: source.load_E.copy() for server_id, source in counts.sources.items()},
        )

    def visits(self, layer: int) -> Visits | None:
        """Where its tokens went; None while nothing was counted."""
        counts = self._layers.get(layer)
        return None if counts is None else counts.visits

    def tokens(self, layer: int) -> float:
        """Decayed."""
        counts = self._layers.get(layer)
        return 0.0 if counts is None else counts.tokens

    def tokens_seen(self, layer: int) -> float:
        """Tokens counted in this layer, without decay: it only grows."""
        counts = self._layers.get(layer)
        return float(counts.seen) if counts is not None else 0.0

    def layer_statistics(self, layer: int) -> LayerStatistics | None:
        """What the online loop asks for; None while nothing was counted."""
        counts = self._layers.get(layer)
        if counts is None:
            return None
        return LayerStatistics(
            tokens=counts.tokens,
            load_E=counts.load_E.copy(),
            coactivation_EE=self._square(counts.pairs_P),
            sources={server_id: source.load_E.copy() for server_id, source in counts.sources.items()},
        )

    def pairs(self, layer: int) -> Floats:
        """Decayed tokens that chose both experts i < j, by rows; empty while nothing was counted."""
        counts = self._layers.get(layer)
        return np.zeros(0) if counts is None else counts.pairs_P.copy()

    def layer_load(self, layer: int) -> Floats | None:
        """Decayed load of each expert; None while nothing was counted."""
        counts = self._layers.get(layer)
        return None if counts is None else counts.load_E.copy()

    def _square(self, pairs_P: Floats) -> Floats:
        square_EE = np.zeros((self._num_experts, self._num_experts))
        square_EE[_pair_indices(self._num_experts)] = pairs_P
        return square_EE + square_EE.T

    def _new_layer(self, layer: int, counts: _Report) -> _Layer:
        made = _Layer(np.zeros_like(counts.load_E), np.zeros_like(counts.pairs_P), _no_visits(counts.visits))
        self._layers[layer] = made
        return made

    def _add(self, layer: _Layer, server_id: str, counts: _Report) -> None:
        kept, weight = self._decay(counts.tokens)
        layer.load_E = kept * layer.load_E + weight * counts.load_E
        layer.pairs_P = kept * layer.pairs_P + weight * counts.pairs_P
        layer.tokens = kept * layer.tokens + weight * counts.tokens
        layer.seen += counts.tokens
        for source in layer.sources.values():
            source.load_E *= kept
            source.tokens *= kept
        source = layer.sources.setdefault(server_id, _Source(np.zeros_like(counts.load_E)))
        source.load_E += weight * counts.load_E
        source.tokens += weight * counts.tokens
        layer.sources = {name: other for name, other in layer.sources.items() if other.tokens >= _FORGOTTEN_TOKENS}
        layer.visits = self._add_visits(layer.visits, counts.visits)

    def _add_visits(self, known: Visits, new: Visits) -> Visits:
        """Visits under a newer placement replace those under the one before."""
        order = (new.view_number, new.version), (known.view_number, known.version)
        if order[0] < order[1] or (order[0] == order[1] and len(new.slot_load_G) != len(known.slot_load_G)):
            return known
        if order[0] > order[1]:
            known = _no_visits(new)
        kept, weight = self._decay(new.tokens)
        return Visits(
            view_number=new.view_number,
            version=new.version,
            tokens=kept * known.tokens + weight * new.tokens,
            rank_visits=kept * known.rank_visits + weight * new.rank_visits,
            node_visits=kept * known.node_visits + weight * new.node_visits,
            slot_load_G=kept * known.slot_load_G + weight * new.slot_load_G,
        )

    def _decay(self, tokens: float) -> tuple[float, float]:
        """What is kept of the older tokens, and the mean weight of the new ones: they came one after another."""
        age = math.log(2) * tokens / self._half_life
        return math.exp(-age), -math.expm1(-age) / age if age else 1.0


@cache
def _pair_indices(num_experts: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of the pairs i < j by rows, in the order of reports."""
    return np.triu_indices(num_experts, 1)


def _no_visits(like: Visits) -> Visits:
    return Visits(
        view_number=like.view_number,
        version=like.version,
        tokens=0.0,
        rank_visits=0.0,
        node_visits=0.0,
        slot_load_G=np.zeros_like(like.slot_load_G),
    )


def _parse(layer: mesh_pb2.LayerStats, view_number: int, model: mesh_pb2.ModelShape) -> _Report:
    """
    Raises:
        ValueError: it is not a layer of this model, or not of its size.
    """
    num_experts, num_pairs = model.num_experts, model.num_experts * (model.num_experts - 1) // 2
    if layer.layer not in model.moe_layers:
        raise ValueError(f"layer {layer.layer} is no MoE layer of the model")
    if len(layer.load) != num_experts or len(layer.coactivation) != num_pairs:
        raise ValueError(
            f"layer {layer.layer} has {len(layer.load)} loads and {len(layer.coactivation)} pairs of experts, "
            f"the model has {num_experts} and {num_pairs}"
        )
    return _Report(
        load_E=np.array(layer.load, np.float64),
        pairs_P=np.array(layer.coactivation, np.float64),
        tokens=layer.tokens,
        visits=Visits(
            view_number=view_number,
            version=layer.version,
            tokens=float(layer.visit_tokens),
            rank_visits=float(layer.rank_visits),
            node_visits=float(layer.node_visits),
            slot_load_G=np.array(layer.slot_load, np.float64),
        ),
    )
