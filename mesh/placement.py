"""Placement tables on a rank that routes: from chosen experts to chosen slots.

Dimensions: T tokens, K experts a token, E experts of the layer, W most ranks that one of them is on, R expert ranks,
G global slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.kernels.host_replicas import host_choose_replicas
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

Ints = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float64]

SHARES_TOLERANCE = 1e-3
"""By how much a quota may miss the sum of 1: it comes in float32, for up to thousands of ranks."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where a view's slots are, as one of its ranks sees it.

    ``node_R``: the node of each expert rank, numbered from 0. ``own_rank``: this rank's expert-rank index, None when
    it hosts no slots; ``own_node``: its node, None when no expert rank is on it; ``source``: its number in the view.
    ``server_id``: of this rank's server; ``server_R``: of the expert ranks', which keep their meaning in the next view;
    none = it has no next.
    """

    slots_per_rank: int
    node_R: tuple[int, ...]
    own_rank: int | None = None
    own_node: int | None = None
    source: int = 0
    server_id: str = ""
    server_R: tuple[str, ...] = ()

    @classmethod
    def of(cls, view: ViewInfo) -> Topology:
        names = [view.proto.ranks[rank].node for rank in view.expert_ranks]
        number = {name: index for index, name in enumerate(dict.fromkeys(names))}
        return cls(
            slots_per_rank=view.slots_per_rank,
            node_R=tuple(number[name] for name in names),
            own_rank=view.expert_index,
            own_node=number.get(view.proto.ranks[view.rank].node),
            source=view.rank,
            server_id=view.proto.ranks[view.rank].server_id,
            server_R=tuple(view.server_ids(view.expert_ranks)),
        )


class LayerRouting:
    """The replicas of one layer's experts, and which of them a token goes to.

    A token pays for each rank and each node that it visits, and for each row the price of its rank: it finds all that
    it can where it has to go anyway, then meets several of its experts in one place, and leaves a rank for another
    when that rank has had some dozens of rows more than its share. Prices rise with this source's own rows and fall
    with the ranks' shares of them; they carry over from step to step once ``commit`` has said that a step is completed.
    Until then the same tokens get the same slots, however often they are asked for.
    """

    def __init__(
        self, slots: Iterable[int], num_experts: int, topology: Topology, *, quota_R: Sequence[float] = ()
    ) -> None:
        """
        Args:
            slots: global slot → expert, -1 = empty.
            quota_R: share of this source's rows that each expert rank should get; none = equal shares.

        Raises:
            ValueError: an expert has no slot, an id is outside the layer's experts, or the quota is not one
                non-negative number a rank, 1 in all.
        """
        expert_G = np.fromiter(slots, dtype=np.int64)
        homes = _homes(expert_G, num_experts)
        homes = [_one_a_rank(home, topology) for home in homes]
        self.share_R = _shares(len(topology.node_R), quota_R)
        width = max(len(home) for home in homes)
        self.is_replicated = width > 1
        self.only_E = torch.tensor([home[0] for home in homes], dtype=torch.int64)
        self.price_R: Floats = np.zeros(len(topology.node_R))
        self._after_R: Floats = np.zeros(len(topology.node_R))
        self.slot_EW: Ints = np.array([home + [-1] * (width - len(home)) for home in homes], dtype=np.int64)
        self.rank_EW = np.where(self.slot_EW < 0, -1, self.slot_EW // topology.slots_per_rank)
        self._node_R = np.array(topology.node_R, dtype=np.int64)
        self._own_rank = -1 if topology.own_rank is None else topology.own_rank
        self._own_node = -1 if topology.own_node is None else topology.own_node

    def choose(self, expert_TK: torch.Tensor, *, goes_on: bool = False) -> torch.Tensor:
        """Global slots for the chosen experts of all this rank's tokens of a step.

        Args:
            expert_TK: int64 on the CPU, K distinct experts a token.
            goes_on: the tokens come behind those of the call before, in the same step: its second micro-batch.

        Returns: int64 [T, K].
        """
        if not self.is_replicated:
            return self.only_E[expert_TK]
        return torch.from_numpy(self.choose_replicas(expert_TK.numpy(), goes_on=goes_on))

    def choose_replicas(self, expert_TK: Ints, *, goes_on: bool = False) -> Ints:
        """``choose`` on arrays, for a layer that is replicated; an expert of -1 gets slot -1."""
        slot_TK = np.empty(expert_TK.shape, np.int64)
        host_choose_replicas(
            np.ascontiguousarray(expert_TK),
            self.slot_EW,
            self.rank_EW,
            self._node_R,
            self._own_rank,
            self._own_node,
            self.share_R,
            self._after_R if goes_on else self.price_R,
            self._after_R,
            slot_TK,
        )
        return slot_TK

    def commit(self) -> None:
        """The step of the last choice is completed: the next one goes on from its prices."""
        self.price_R[:] = self._after_R

    def set_prices(self, price_R: Floats) -> None:
        """Between two steps: go on from these prices of the expert ranks."""
        self.price_R[:] = price_R
        self._after_R[:] = price_R


class Follower(Protocol):
    """Keeps copies of the tables where replicas are chosen instead, as on a device."""

    def put(self, layer: int, routing: LayerRouting) -> None:
        """Another placement of a layer, between two steps."""

    def commit(self) -> None:
        """A step is completed in which every layer has chosen."""


class RoutingTables:
    """The routing of every MoE layer of a view. Prices outlive placements and views: they are of ranks, not of slots.

    ``choose`` and ``commit`` of a step, ``replace`` and ``put`` belong to one thread.
    """

    def __init__(
        self,
        placements: Iterable[mesh_pb2.LayerPlacement],
        num_experts: int,
        topology: Topology,
        earlier: RoutingTables | None = None,
    ) -> None:
        """``earlier``: of the view before, whose servers' prices are taken over; those of new servers are 0."""
        self._num_experts = num_experts
        self._topology = topology
        self._layers: dict[int, LayerRouting] = {}
        self._follower: Follower | None = None
        for placement in placements:
            self.replace(placement)
            if earlier is not None:
                self._layers[placement.layer].set_prices(earlier.prices(placement.layer, topology.server_R))

    def replace(self, placement: mesh_pb2.LayerPlacement) -> None:
        """Route a layer by another placement from now on; ``prepare`` and ``put`` are its two halves.

        Raises:
            ValueError: the placement misses an expert or is not of this view, or this rank's quota is wrong.
        """
        self.put(placement.layer, self.prepare(placement))

    def prepare(self, placement: mesh_pb2.LayerPlacement) -> LayerRouting:
        """The table of a placement; from any thread."""
        own = self._topology.server_id
        quota_R = next((quota.rank_share for quota in placement.source_quotas if quota.server_id == own), ())
        return LayerRouting(placement.slots, self._num_experts, self._topology, quota_R=quota_R)

    def put(self, layer: int, routing: LayerRouting) -> None:
        """Between two steps."""
        if layer in self._layers:
            routing.set_prices(self._layers[layer].price_R)
        self._layers[layer] = routing
        if self._follower is not None:
            self._follower.put(layer, routing)

    def follow(self, follower: Follower) -> None:
        """Tell ``follower`` from now on."""
        self._follower = follower

    def commit(self) -> None:
        """A step is completed in which every layer has chosen."""
        if self._follower is not None:
            self._follower.commit()
            return
        for routing in self._layers.values():
            routing.commit()

    def prices(self, layer: int, server_R: Sequence[str]) -> Floats:
        """What rows of a layer cost on these servers, float64 [R]."""
        known = dict(zip(self._topology.server_R, self._layers[layer].price_R.tolist(), strict=True))
        return np.array([known.get(server, 0.0) for server in server_R])

    def __getitem__(self, layer: int) -> LayerRouting:
        return self._layers[layer]


def _homes(expert_G: Ints, num_experts: int) -> list[list[int]]:
    """Expert → its slots in ascending order."""
    homes: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, expert in enumerate(expert_G.tolist()):
        if expert >= num_experts or expert < -1:
            raise ValueError(f"slot {slot} holds expert {expert}, but the layer has {num_experts} experts")
        if expert >= 0:
            homes[expert].append(slot)
    missing = [expert for expert, home in enumerate(homes) if not home]
    if missing:
        raise ValueError(f"experts {missing} have no slot")
    return homes


def _one_a_rank(home: list[int], topology: Topology) -> list[int]:
    """The first of an expert's slots on each rank; sources begin with different ones."""
    first_of: dict[int, int] = {}
    for slot in home:
        first_of.setdefault(slot // topology.slots_per_rank, slot)
    slots = list(first_of.values())
    first = topology.source % len(slots)
    return slots[first:] + slots[:first]


def _shares(num_ranks: int, quota_R: Sequence[float]) -> Floats:
    """The quota as shares that add up to 1."""
    if not len(quota_R):
        return np.full(num_ranks, 1 / num_ranks)
    share_R = np.array(quota_R, dtype=np.float64)
    if share_R.shape != (num_ranks,) or not (share_R >= 0).all() or abs(share_R.sum() - 1) > SHARES_TOLERANCE:
        raise ValueError(f"quota: {num_ranks} expert ranks need as many shares of 0 or more that add up to 1")
    normed_R: Floats = share_R / share_R.sum()
    return normed_R
