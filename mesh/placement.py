"""Placement tables on a rank that routes: from chosen experts to chosen slots.

Dimensions: T tokens, K experts a token, E experts of the layer, W most ranks that one of them is on, R expert ranks,
G global slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.kernels.host_replicas import host_choose_replicas
from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

Ints = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float64]

LEAN = 0.05
"""Cost of a replica for each factor of e by which its quota is below its expert's largest: it decides among equals."""
_SMALLEST_SHARE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where a view's slots are, as one of its ranks sees it.

    ``node_R``: the node of each expert rank, numbered from 0. ``own_rank``: this rank's expert-rank index, None when
    it hosts no slots; ``own_node``: its node, None when no expert rank is on it; ``source``: its number in the view.
    ``server_R``: ids of the expert ranks' servers, which keep their meaning in the next view; none = it has no next.
    """

    slots_per_rank: int
    node_R: tuple[int, ...]
    own_rank: int | None = None
    own_node: int | None = None
    source: int = 0
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
            server_R=tuple(view.server_ids(view.expert_ranks)),
        )


class LayerRouting:
    """The replicas of one layer's experts, and which of them a token goes to.

    A token pays for each rank and each node that it visits, and for each row the price of its rank: it finds all that
    it can where it has to go anyway, then meets several of its experts in one place, and leaves a rank for another
    when that rank has had some dozens of rows more. Prices rise with this source's own rows and fall with the mean;
    they carry over from step to step once ``commit`` has said that a step is completed. Until then the same tokens get
    the same slots, however often they are asked for.
    """

    def __init__(
        self, slots: Iterable[int], num_experts: int, topology: Topology, *, quotas: Sequence[float] = ()
    ) -> None:
        """
        Args:
            slots: global slot → expert, -1 = empty.
            quotas: global slot → share of its expert's tokens, none = equal shares. Among replicas that cost a token
                the same the largest comes first; one of 0 gets nothing.

        Raises:
            ValueError: an expert has no slot, an id is outside the layer's experts, or the quotas are not one
                non-negative number a slot.
        """
        expert_G = np.fromiter(slots, dtype=np.int64)
        homes = _homes(expert_G, num_experts)
        share_G = _shares(expert_G, homes, quotas)
        homes = [_one_a_rank(home, share_G, topology) for home in homes]
        width = max(len(home) for home in homes)
        self.is_replicated = width > 1
        self.only_E = torch.tensor([home[0] for home in homes], dtype=torch.int64)
        self.price_R: Floats = np.zeros(len(topology.node_R))
        self._after_R: Floats = np.zeros(len(topology.node_R))
        if not self.is_replicated:
            return
        self._slot_EW = np.array([home + [-1] * (width - len(home)) for home in homes], dtype=np.int64)
        self._rank_EW = np.where(self._slot_EW < 0, -1, self._slot_EW // topology.slots_per_rank)
        self._lean_EW = np.array([_leans(home, share_G) + [0.0] * (width - len(home)) for home in homes])
        self._node_R = np.array(topology.node_R, dtype=np.int64)
        self._own_rank = -1 if topology.own_rank is None else topology.own_rank
        self._own_node = -1 if topology.own_node is None else topology.own_node

    def choose(self, expert_TK: torch.Tensor) -> torch.Tensor:
        """Global slots for the chosen experts of all this rank's tokens of a step.

        ``expert_TK`` int64 on the CPU, K distinct experts a token. Returns int64 [T, K].
        """
        if not self.is_replicated:
            return self.only_E[expert_TK]
        return torch.from_numpy(self.choose_replicas(expert_TK.numpy()))

    def choose_replicas(self, expert_TK: Ints) -> Ints:
        """``choose`` on arrays, for a layer that is replicated; an expert of -1 gets slot -1."""
        slot_TK = np.empty(expert_TK.shape, np.int64)
        host_choose_replicas(
            np.ascontiguousarray(expert_TK),
            self._slot_EW,
            self._rank_EW,
            self._lean_EW,
            self._node_R,
            self._own_rank,
            self._own_node,
            self.price_R,
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
        self._follower: Callable[[int, LayerRouting], None] | None = None
        for placement in placements:
            self.replace(placement)
            if earlier is not None:
                self._layers[placement.layer].set_prices(earlier.prices(placement.layer, topology.server_R))

    def replace(self, placement: mesh_pb2.LayerPlacement) -> None:
        """Route a layer by another placement from now on; ``prepare`` and ``put`` are its two halves.

        Raises:
            ValueError: the placement misses an expert or is not of this view.
        """
        self.put(placement.layer, self.prepare(placement))

    def prepare(self, placement: mesh_pb2.LayerPlacement) -> LayerRouting:
        """The table of a placement; from any thread."""
        return LayerRouting(placement.slots, self._num_experts, self._topology, quotas=placement.quotas)

    def put(self, layer: int, routing: LayerRouting) -> None:
        """Between two steps."""
        if layer in self._layers:
            routing.set_prices(self._layers[layer].price_R)
        self._layers[layer] = routing
        if self._follower is not None:
            self._follower(layer, routing)

    def follow(self, follower: Callable[[int, LayerRouting], None]) -> None:
        """``follower`` is called at every ``put`` from now on: it keeps copies on a device."""
        self._follower = follower

    def commit(self) -> None:
        """A step is completed in which every layer has chosen."""
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


def _one_a_rank(home: list[int], share_G: Floats, topology: Topology) -> list[int]:
    """Of an expert's slots that get tokens the one with the largest share on each rank; sources begin with different
    ones."""
    best: dict[int, int] = {}
    for slot in home:
        rank = slot // topology.slots_per_rank
        if share_G[slot] > 0 and (rank not in best or share_G[slot] > share_G[best[rank]]):
            best[rank] = slot
    slots = list(best.values())
    first = topology.source % len(slots)
    return slots[first:] + slots[:first]


def _leans(home: list[int], share_G: Floats) -> list[float]:
    shares = [max(float(share_G[slot]), _SMALLEST_SHARE) for slot in home]
    return [LEAN * math.log(max(shares) / share) for share in shares]


def _shares(expert_G: Ints, homes: list[list[int]], quotas: Sequence[float]) -> Floats:
    """Global slot → share of its expert's tokens; those of an expert add up to 1."""
    quota_G = np.array(quotas, dtype=np.float64) if len(quotas) else np.ones(len(expert_G))
    if quota_G.shape != expert_G.shape or not np.isfinite(quota_G).all() or (quota_G < 0).any():
        raise ValueError(f"quotas: {len(expert_G)} slots need as many non-negative numbers")
    share_G = np.zeros(len(expert_G))
    for home in homes:
        total = quota_G[home].sum()
        share_G[home] = quota_G[home] / total if total else 1 / len(home)
    return share_G
