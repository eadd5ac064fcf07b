"""Routing on a device: where the gate kernel finds each layer's slots and prices, and the counts that it adds to.

Tensors are replaced in place when a placement changes, so that CUDA graphs which read them stay valid.

Dimensions: L MoE layers, E experts, W replicas of an expert that are chosen among, R expert ranks, G global slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertmesh.kernels.gate import ReplicaPrices, RoutingTotals, SlotTables
from expertmesh.mesh.placement import LayerRouting, RoutingTables, Topology
from expertmesh.mesh.statistics import Counts

MOST_REPLICAS = 4
"""That a token chooses among: the shapes of a view's graphs must not change. Of an expert on more ranks each source
sees the first ones, and sources begin with different ones."""


class DeviceRouting:
    """The slot tables, replica prices and routing totals of every MoE layer of a view; prices begin at 0.

    ``put``, ``commit`` and reading the totals belong to the step thread, between two steps.
    """

    def __init__(
        self,
        routing: RoutingTables,
        topology: Topology,
        moe_layers: Sequence[int],
        *,
        num_experts: int,
        device: torch.device,
    ) -> None:
        """Follows ``routing`` from now on."""
        self._topology = topology
        num_ranks, num_layers = len(topology.node_R), len(moe_layers)
        num_slots = num_ranks * topology.slots_per_rank
        width = min(MOST_REPLICAS, num_ranks) if num_slots > num_experts else 1
        self._row_of_layer = {layer: row for row, layer in enumerate(moe_layers)}
        node_R = torch.tensor(topology.node_R, dtype=torch.int32, device=device)
        self._tables = {layer: _empty_tables(num_experts, width, node_R, topology) for layer in moe_layers}
        self._price_2LR = torch.zeros(2, num_layers, num_ranks, dtype=torch.float64, device=device)
        self._share_LR = torch.zeros(num_layers, num_ranks, dtype=torch.float64, device=device)
        self._rows_LR = torch.zeros(num_layers, num_ranks, dtype=torch.int64, device=device)
        self.pairs_LEE = torch.zeros(num_layers, num_experts, num_experts, dtype=torch.int64, device=device)
        self.slot_load_LG = torch.zeros(num_layers, num_slots, dtype=torch.int64, device=device)
        self.visits_L2 = torch.zeros(num_layers, 2, dtype=torch.int64, device=device)
        self._is_replicated = width > 1
        # Made once: what slicing costs the host, a step that it enqueues layer by layer waits for.
        self._prices = {
            (layer, goes_on): self._prices_of(row, goes_on)
            for layer, row in self._row_of_layer.items()
            for goes_on in (False, True)
        }
        self._totals = {layer: self._totals_of(row) for layer, row in self._row_of_layer.items()}
        for layer in moe_layers:
            self.put(layer, routing[layer])
        routing.follow(self)

    def put(self, layer: int, routing: LayerRouting) -> None:
        """Another placement or quota of a layer: what is enqueued from now on is routed by it."""
        tables = self._tables[layer]
        width = tables.replica_EW.shape[1]
        slot_EW = torch.full(tables.replica_EW.shape, -1, dtype=torch.int32)
        found_EW = torch.from_numpy(routing.slot_EW)[:, :width]
        slot_EW[:, : found_EW.shape[1]] = found_EW
        tables.replica_EW.copy_(slot_EW, non_blocking=True)
        tables.rank_EW.copy_(slot_EW // self._topology.slots_per_rank, non_blocking=True)  # of -1 it is -1
        self._share_LR[self._row_of_layer[layer]].copy_(torch.from_numpy(routing.share_R), non_blocking=True)

    def commit(self) -> None:
        """A step is completed in which every layer has chosen: the next one goes on from its prices."""
        if self._is_replicated:
            self._price_2LR[0].copy_(self._price_2LR[1])

    def take_totals(self) -> DeviceTotals:
        """What was counted since the call before, on its way to the host; the device counts from 0 on."""
        totals = DeviceTotals(self.pairs_LEE, self.slot_load_LG, self.visits_L2)
        for counts in (self.pairs_LEE, self.slot_load_LG, self.visits_L2):
            counts.zero_()
        return totals

    def tables(self, layer: int) -> SlotTables:
        return self._tables[layer]

    def prices(self, layer: int, *, goes_on: bool = False) -> ReplicaPrices | None:
        """For ``route``; None where there is nothing to choose.

        ``goes_on``: of tokens behind others of the same step, which are enqueued; they find the prices behind those.
        """
        return self._prices[layer, goes_on] if self._is_replicated else None

    def _prices_of(self, row: int, goes_on: bool) -> ReplicaPrices:
        return ReplicaPrices(
            price_R=self._price_2LR[int(goes_on), row],
            after_R=self._price_2LR[1, row],
            share_R=self._share_LR[row],
            rows_R=self._rows_LR[row],
        )

    def totals(self, layer: int) -> RoutingTotals:
        return self._totals[layer]

    def _totals_of(self, row: int) -> RoutingTotals:
        return RoutingTotals(
            pairs_EE=self.pairs_LEE[row], slot_load_G=self.slot_load_LG[row], visits=self.visits_L2[row]
        )


class DeviceTotals:
    """Counts on their way to the host."""

    def __init__(self, *counts: torch.Tensor) -> None:
        is_cuda = counts[0].is_cuda
        self._host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=is_cuda) for part in counts]
        for host, part in zip(self._host, counts, strict=True):
            host.copy_(part, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self._done.record()

    @property
    def is_there(self) -> bool:
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]  # torch's

    def fetch(self) -> tuple[Counts, Counts, Counts]:
        """pairs [L, E, E], slot load [L, G] and visits [L, 2]; waits for them."""
        if self._done is not None:
            self._done.synchronize()
        pairs_LEE, slot_load_LG, visits_L2 = (part.numpy() for part in self._host)
        return pairs_LEE, slot_load_LG, visits_L2


def _empty_tables(num_experts: int, width: int, node_R: torch.Tensor, topology: Topology) -> SlotTables:
    empty_2EW = torch.full((2, num_experts, width), -1, dtype=torch.int32, device=node_R.device)
    return SlotTables(
        replica_EW=empty_2EW[0],
        rank_EW=empty_2EW[1],
        node_R=node_R,
        own_rank=-1 if topology.own_rank is None else topology.own_rank,
        own_node=-1 if topology.own_node is None else topology.own_node,
    )
