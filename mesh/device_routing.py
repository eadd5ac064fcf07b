"""Routing on a device: where the gate kernel finds each layer's slots, and the counts that it adds to.

Tensors are replaced in place when a placement changes, so that CUDA graphs which read them stay valid.

Dimensions: L MoE layers, E experts, R expert ranks, G global slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from expertmesh.kernels.gate import RoutingTotals, SlotTables
from expertmesh.mesh.placement import LayerRouting, RoutingTables, Topology


class DeviceRouting:
    """The slot tables and routing totals of every MoE layer of a view.

    ``put`` and ``take_totals`` belong to the step thread, between two steps.
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
        num_ranks = len(topology.node_R)
        num_slots, num_layers = num_ranks * topology.slots_per_rank, len(moe_layers)
        self._row_of_layer = {layer: row for row, layer in enumerate(moe_layers)}
        node_R = torch.tensor(topology.node_R, dtype=torch.int32, device=device)
        self.first_turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._tables = {layer: _empty_tables(num_experts, node_R) for layer in moe_layers}
        counts = {"dtype": torch.int64, "device": device}
        self.pairs_LEE = torch.zeros(num_layers, num_experts, num_experts, **counts)
        self.slot_load_LG = torch.zeros(num_layers, num_slots, **counts)
        self.visits_L2 = torch.zeros(num_layers, 2, **counts)
        for layer in moe_layers:
            self.put(layer, routing[layer])
        routing.follow(self.put)

    def put(self, layer: int, routing: LayerRouting) -> None:
        """Another placement of a layer: what is enqueued from now on is routed by it."""
        tables = self._tables[layer]
        # Any replica computes the same: until the device chooses among them, the first one does it all.
        slot_E1 = routing.only_E[:, None].int()
        tables.replica_EW.copy_(slot_E1, non_blocking=True)
        tables.rank_EW.copy_(slot_E1 // self._topology.slots_per_rank, non_blocking=True)

    def tables(self, layer: int) -> SlotTables:
        return self._tables[layer]

    def totals(self, layer: int) -> RoutingTotals:
        row = self._row_of_layer[layer]
        return RoutingTotals(
            pairs_EE=self.pairs_LEE[row], slot_load_G=self.slot_load_LG[row], visits=self.visits_L2[row]
        )


def _empty_tables(num_experts: int, node_R: torch.Tensor) -> SlotTables:
    """Of a layer without replicas."""
    num_ranks, device = len(node_R), node_R.device
    return SlotTables(
        replica_EW=torch.zeros(num_experts, 1, dtype=torch.int32, device=device),
        rank_EW=torch.zeros(num_experts, 1, dtype=torch.int32, device=device),
        bias_EW=torch.zeros(num_experts, 1, dtype=torch.float64, device=device),
        affinity_ER=torch.zeros(num_experts, num_ranks, dtype=torch.float64, device=device),
        turn_PR=torch.zeros(2, num_ranks, dtype=torch.float64, device=device),
        node_R=node_R,
        num_turns=1,
        rank_limit=0.0,
    )
