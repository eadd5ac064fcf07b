"""Routing statistics of one attention half: what its tokens chose, and where they went.

Dimensions: L MoE layers, T tokens of a step, N tokens of a block, K experts a token, E experts, R expert ranks, G
global slots, P pairs i <= j of a token's choices.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from expertmesh.mesh.placement import Ints, Topology
from expertmesh.v1 import mesh_pb2

Counts = npt.NDArray[np.int64]

_BLOCK_TOKENS = 256  # N: counted at once; more where a layer has so many pairs of experts that passing over them costs
_BLOCK_TOKENS_AN_EXPERT = 4
_CELLS_AT_ONCE = 1 << 18  # counters of one pass: they and their increments stay in the cache
_REPORT_BYTES = 1 << 20
_BYTES_A_COUNT = 3  # as a protobuf varint, about


class RoutingCounts:
    """Counts of completed steps since the last report. Not thread-safe.

    ``pairs_LEE``: at [l, i, j], how often a token chose expert j of layer l after or as i, in the gate's order: the
    diagonal is the load. Visits and ``slot_load_LG`` cover the ``visit_tokens_L`` tokens since the layer got its
    version in this view.
    """

    def __init__(
        self, view_number: int, versions_L: Sequence[int], topology: Topology, *, num_experts: int, top_k: int
    ) -> None:
        layers, slots = len(versions_L), topology.slots_per_rank * len(topology.node_R)
        self.view_number = view_number
        self.versions_L = list(versions_L)
        self.num_tokens = 0
        self.pairs_LEE: Counts = np.zeros((layers, num_experts, num_experts), np.int64)
        self.rank_visits_L: Counts = np.zeros(layers, np.int64)
        self.node_visits_L: Counts = np.zeros(layers, np.int64)
        self.visit_tokens_L: Counts = np.zeros(layers, np.int64)
        self.slot_load_LG: Counts = np.zeros((layers, slots), np.int64)
        self.topology = topology
        self._node_R = np.array(topology.node_R)
        self._num_nodes = len(set(topology.node_R))
        block = max(_BLOCK_TOKENS, _BLOCK_TOKENS_AN_EXPERT * num_experts)
        self._first_P, self._second_P = np.triu_indices(top_k)
        self._expert_LNK: Counts = np.empty((layers, block, top_k), np.int64)
        self._slot_LNK: Counts = np.empty((layers, block, top_k), np.int64)
        self._filled = 0

    def fresh(self) -> RoutingCounts:
        """Empty counts under the same view and versions."""
        _, _, num_experts = self.pairs_LEE.shape
        top_k = self._expert_LNK.shape[2]
        return RoutingCounts(self.view_number, self.versions_L, self.topology, num_experts=num_experts, top_k=top_k)

    def add(self, expert_LTK: Ints, slot_LTK: Ints) -> None:
        """Tokens of a completed step; they are counted a block at a time."""
        start, num_tokens = 0, expert_LTK.shape[1]
        while start < num_tokens:
            count = min(num_tokens - start, self._expert_LNK.shape[1] - self._filled)
            block = slice(self._filled, self._filled + count)
            self._expert_LNK[:, block] = expert_LTK[:, start : start + count]
            self._slot_LNK[:, block] = slot_LTK[:, start : start + count]
            self._filled += count
            start += count
            if self._filled == self._expert_LNK.shape[1]:
                self.fold()
        self.num_tokens += num_tokens

    def fold(self) -> None:
        """Count the tokens of the block."""
        count, self._filled = self._filled, 0
        if not count:
            return
        layers, num_experts, _ = self.pairs_LEE.shape
        at_once = max(1, _CELLS_AT_ONCE // num_experts**2)
        for first in range(0, layers, at_once):
            part = slice(first, first + at_once)
            self._count_pairs(part, self._expert_LNK[part, :count])
            self._count_visits(part, self._slot_LNK[part, :count])
        self.visit_tokens_L += count

    def _count_pairs(self, part: slice, expert_LNK: Counts) -> None:
        layers, num_experts = len(expert_LNK), self.pairs_LEE.shape[1]
        first_LN_K = expert_LNK * num_experts
        first_LN_K += np.arange(0, layers * num_experts**2, num_experts**2)[:, None, None]
        code_LNP = first_LN_K[..., self._first_P] + expert_LNK[..., self._second_P]
        found = np.bincount(code_LNP.ravel(), minlength=layers * num_experts**2)
        self.pairs_LEE[part] += found.reshape(layers, num_experts, num_experts)

    def _count_visits(self, part: slice, slot_LNK: Counts) -> None:
        layers, tokens, top_k = slot_LNK.shape
        num_slots = self.slot_load_LG.shape[1]
        cell_LNK = slot_LNK + np.arange(0, layers * num_slots, num_slots)[:, None, None]
        load = np.bincount(cell_LNK.ravel(), minlength=layers * num_slots)
        self.slot_load_LG[part] += load.reshape(layers, num_slots)
        rank_MK = slot_LNK.reshape(-1, top_k) // self.topology.slots_per_rank
        self.rank_visits_L[part] += _distinct(rank_MK, len(self._node_R), layers)
        if self._num_nodes == 1:
            self.node_visits_L[part] += tokens
        else:
            self.node_visits_L[part] += _distinct(self._node_R[rank_MK], self._num_nodes, layers)

    def change_versions(self, versions_L: Sequence[int]) -> None:
        """Layers migrated: their visits start again."""
        self.fold()
        changed = [
            index for index, (old, new) in enumerate(zip(self.versions_L, versions_L, strict=True)) if old != new
        ]
        self.versions_L = list(versions_L)
        for counts in (self.rank_visits_L, self.node_visits_L, self.visit_tokens_L, self.slot_load_LG):
            counts[changed] = 0

    def adopt(self, earlier: RoutingCounts) -> None:
        """Go on from the counts of an earlier view: their visits are void."""
        earlier.fold()
        self.num_tokens += earlier.num_tokens
        self.pairs_LEE += earlier.pairs_LEE


def _distinct(value_MK: Counts, num_values: int, layers: int) -> Counts:
    """How many distinct values the rows have, summed over the M / layers rows of each layer."""
    is_there = np.zeros((len(value_MK), num_values), np.bool_)
    is_there[np.arange(len(value_MK))[:, None], value_MK] = True
    distinct: Counts = np.count_nonzero(is_there.reshape(layers, -1), axis=1)
    return distinct


class RoutingStatistics:
    """The step thread adds completed steps, the event loop takes what has come together. Thread-safe."""

    def __init__(self, moe_layers: Sequence[int], *, num_experts: int, top_k: int) -> None:
        self._moe_layers = tuple(moe_layers)
        self._num_experts = num_experts
        self._top_k = top_k
        self._lock = threading.Lock()
        self._counts: RoutingCounts | None = None

    def enter_view(self, number: int, versions_L: Sequence[int], topology: Topology) -> None:
        """A view began; ``versions_L`` are the placement versions of the MoE layers in order."""
        counts = RoutingCounts(number, versions_L, topology, num_experts=self._num_experts, top_k=self._top_k)
        with self._lock:
            if self._counts is not None:
                counts.adopt(self._counts)
            self._counts = counts

    def add(self, versions_L: Sequence[int], expert_LTK: Ints, slot_LTK: Ints) -> None:
        """A step was completed, all MoE layers under these placement versions."""
        with self._lock:
            counts = self._counts
            assert counts is not None, "steps happen in a view"
            if counts.versions_L != versions_L:
                counts.change_versions(versions_L)
            counts.add(expert_LTK, slot_LTK)

    def add_totals(
        self, versions_L: Sequence[int], num_tokens: int, pairs_LEE: Counts, slot_load_LG: Counts, visits_L2: Counts
    ) -> None:
        """Completed steps that were counted elsewhere, all under these placement versions.

        ``visits_L2``: ranks, then nodes that the tokens visited; the rest is as in ``RoutingCounts``.
        """
        with self._lock:
            counts = self._counts
            assert counts is not None, "steps happen in a view"
            if counts.versions_L != versions_L:
                counts.change_versions(versions_L)
            counts.num_tokens += num_tokens
            counts.pairs_LEE += pairs_LEE
            counts.slot_load_LG += slot_load_LG
            counts.rank_visits_L += visits_L2[:, 0]
            counts.node_visits_L += visits_L2[:, 1]
            counts.visit_tokens_L += num_tokens

    def take(self) -> RoutingCounts | None:
        """What came together since the call before, None when nothing did."""
        with self._lock:
            counts = self._counts
            if counts is None or not counts.num_tokens:
                return None
            self._counts = counts.fresh()
        counts.fold()
        return counts

    def reports(self, counts: RoutingCounts, sequences: Iterator[int]) -> Iterator[mesh_pb2.StatsReport]:
        """``counts`` as messages of about a megabyte at most, numbered by ``sequences``."""
        num_experts, num_slots = self._num_experts, counts.slot_load_LG.shape[1]
        layer_bytes = _BYTES_A_COUNT * (num_experts * (num_experts + 1) // 2 + num_slots)
        at_once = max(1, _REPORT_BYTES // layer_bytes)
        above = np.triu_indices(num_experts, 1)
        for first in range(0, len(self._moe_layers), at_once):
            report = mesh_pb2.StatsReport(sequence=next(sequences), view_number=counts.view_number)
            for index in range(first, min(first + at_once, len(self._moe_layers))):
                pairs_EE = counts.pairs_LEE[index]
                report.layers.add(
                    layer=self._moe_layers[index],
                    version=counts.versions_L[index],
                    tokens=counts.num_tokens,
                    load=np.diagonal(pairs_EE).tolist(),
                    coactivation=(pairs_EE + pairs_EE.T)[above].tolist(),
                    rank_visits=int(counts.rank_visits_L[index]),
                    node_visits=int(counts.node_visits_L[index]),
                    slot_load=counts.slot_load_LG[index].tolist(),
                    visit_tokens=int(counts.visit_tokens_L[index]),
                )
            yield report
