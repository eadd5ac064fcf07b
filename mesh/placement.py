"""Placement tables on a rank that routes: from chosen experts to chosen slots.

Dimensions: T tokens, K experts a token, E experts of the layer, W most replicas that one of them has, R expert ranks,
G global slots, P length of the table of turns. The arithmetic is NumPy's: at the sizes of a decode step an operation
of it costs a third of one of torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

Ints = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float64]

LOAD_SLACK = 0.02
"""A replica gets at most its share of its expert's tokens in a batch times one plus this, rounded up. More slack buys
locality with balance."""

_LEAST_CAP = 8  # tokens that any replica may take: so few cost an expert server no more than the first of them
_NUM_TURNS = 1024  # P
_SOURCE_STRIDE = 389  # a prime: two ranks that route at the same step do not take the same turns
_TURN_LIMIT = 14.0  # every turn lies between minus this and this
_SMALLEST_SHARE = 1e-5
# What a choice of an expert speaks for a rank. Each kind outweighs all that the choices of a token (16 at most) can say
# of the kinds below it, and the least outweighs any two turns.
_OUTWEIGHS = 33
_MEET_ON_RANK = 32.0
_MEET_ON_NODE = _MEET_ON_RANK * _OUTWEIGHS
_ON_NODE = _MEET_ON_NODE * _OUTWEIGHS
_ON_RANK = _ON_NODE * _OUTWEIGHS
_REGRET_LIMIT = 2 * _ON_RANK


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where a view's slots are, as one of its ranks sees it.

    ``node_R``: the node of each expert rank, numbered from 0. ``own_rank``: this rank's expert-rank index, None when
    it hosts no slots; ``own_node``: its node, None when no expert rank is on it; ``source``: its number in the view.
    """

    slots_per_rank: int
    node_R: tuple[int, ...]
    own_rank: int | None = None
    own_node: int | None = None
    source: int = 0

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
        )


class LayerRouting:
    """The replicas of one layer's experts, and which of them a token goes to.

    A token that has to visit a rank, because that rank has the only replica of another of its experts, finds all the
    experts there that it can: that costs no message. Next come ranks of a node that it visits, then ranks where
    several of its experts meet. Among equals the replicas take turns in the proportion of their quotas. No replica
    takes more than its quota of a batch by ``slack``: what is beyond it goes to the replicas with the most room, the
    tokens first that lose least. All of it depends on nothing but the arguments.
    """

    def __init__(
        self,
        slots: Iterable[int],
        num_experts: int,
        topology: Topology,
        *,
        quotas: Sequence[float] = (),
        slack: float = LOAD_SLACK,
    ) -> None:
        """
        Args:
            slots: global slot → expert, -1 = empty.
            quotas: global slot → share of its expert's tokens; none = equal shares.

        Raises:
            ValueError: an expert has no slot, an id is outside the layer's experts, or the quotas are not one
                non-negative number a slot.
        """
        self._expert_G = np.fromiter(slots, dtype=np.int64)
        homes = _homes(self._expert_G, num_experts)
        self._width = max(len(home) for home in homes)
        self.is_replicated = self._width > 1
        self.only_E = torch.tensor([home[0] for home in homes], dtype=torch.int64)
        if not self.is_replicated:
            return
        share_G = _shares(self._expert_G, homes, quotas)
        self._num_ranks = len(topology.node_R)
        self._source = topology.source
        self._allowance_G = share_G * (1 + slack)
        self._least_cap_G = np.where(share_G > 0, _LEAST_CAP, 0)
        self._replica_EW = np.array([(home + home[:1] * self._width)[: self._width] for home in homes])
        self._rank_EW = self._replica_EW // topology.slots_per_rank
        bias_G = np.where(share_G > 0, np.log(np.maximum(share_G, _SMALLEST_SHARE)), -np.inf)
        self._bias_EW = bias_G[self._replica_EW]
        for expert, home in enumerate(homes):
            self._bias_EW[expert, len(home) :] = -np.inf
        self._affinity_ER = _affinity(homes, topology)
        self._turn_PR = _turns(self._num_ranks)

    def choose(self, expert_TK: torch.Tensor, turn: int) -> torch.Tensor:
        """Global slots for the chosen experts. The same for the same ``turn``, which is the step's number.

        ``expert_TK`` int64 on the CPU, K distinct experts a token. Returns int64 [T, K].
        """
        if not self.is_replicated:
            return self.only_E[expert_TK]
        return torch.from_numpy(self.choose_replicas(expert_TK.numpy(), turn))

    def choose_replicas(self, expert_TK: Ints, turn: int) -> Ints:
        """``choose`` on arrays, for a layer that is replicated."""
        num_tokens = len(expert_TK)
        score_TR = self._affinity_ER.take(expert_TK, axis=0).sum(axis=1)
        np.minimum(score_TR, _ON_RANK, out=score_TR)
        score_TR += self._turns_of(num_tokens, turn)
        cell_TKW = self._rank_EW.take(expert_TK, axis=0)
        cell_TKW += np.arange(0, num_tokens * self._num_ranks, self._num_ranks)[:, None, None]
        score_TKW = score_TR.take(cell_TKW)
        score_TKW += self._bias_EW.take(expert_TK, axis=0)
        cell_TK = score_TKW.argmax(axis=-1)
        cell_TK += expert_TK * self._width
        slot_TK: Ints = self._replica_EW.take(cell_TK)
        if num_tokens > _LEAST_CAP:
            self._level(slot_TK.reshape(-1), expert_TK.reshape(-1), score_TKW.reshape(-1, self._width))
        return slot_TK

    def _turns_of(self, num_tokens: int, turn: int) -> Floats:
        first = (turn + self._source * _SOURCE_STRIDE) % _NUM_TURNS
        if num_tokens <= _NUM_TURNS:
            return self._turn_PR[first : first + num_tokens]
        return self._turn_PR[np.arange(first, first + num_tokens) % _NUM_TURNS]

    def _level(self, slot_C: Ints, expert_C: Ints, score_CW: Floats) -> None:
        """Move the choices that are beyond their replica's cap, in place: C = T * K choices.

        A round moves what is beyond a cap to the expert's replica with the most room and so fills that one at least:
        there are no more rounds than replicas, and with two of each expert there is one.
        """
        load_G = np.bincount(slot_C, minlength=len(self._expert_G))
        chosen_E = np.bincount(expert_C, minlength=len(self._rank_EW))
        room_G = np.maximum(np.ceil(chosen_E.take(self._expert_G) * self._allowance_G), self._least_cap_G) - load_G
        while room_G.min() < 0:
            beyond_G = room_G < 0
            chosen = beyond_G[slot_C].nonzero()[0]
            slot = slot_C[chosen]
            by_regret = chosen[np.argsort(slot * _REGRET_LIMIT + _regret(score_CW[chosen]))]
            over = beyond_G.nonzero()[0]
            excess = -room_G[over].astype(np.int64)
            load = load_G[over]
            first = np.cumsum(load) - load - np.cumsum(excess) + excess
            moved = by_regret[np.repeat(first, excess) + np.arange(excess.sum())]
            expert = self._expert_G[over]
            target = self._replica_EW[expert, room_G[self._replica_EW[expert]].argmax(axis=1)]
            slot_C[moved] = np.repeat(target, excess)
            load_G[over] -= excess
            room_G[over] = 0
            np.add.at(load_G, target, excess)
            np.subtract.at(room_G, target, excess)


def _regret(score_CW: Floats) -> Floats:
    """What a choice loses with its second best replica."""
    if score_CW.shape[1] == 2:
        regret_C = score_CW[:, 0] - score_CW[:, 1]
        return np.minimum(np.abs(regret_C, out=regret_C), _REGRET_LIMIT - 1, out=regret_C)
    score_CW.sort(axis=1)
    return np.minimum(score_CW[:, -1] - score_CW[:, -2], _REGRET_LIMIT - 1)


class RoutingTables:
    """The routing of every MoE layer of a view."""

    def __init__(self, placements: Iterable[mesh_pb2.LayerPlacement], num_experts: int, topology: Topology) -> None:
        self._num_experts = num_experts
        self._topology = topology
        self._layers: dict[int, LayerRouting] = {}
        for placement in placements:
            self.replace(placement)

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
        self._layers[layer] = routing

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


def _affinity(homes: list[list[int]], topology: Topology) -> Floats:
    """Float64 [E, R]: what a choice of expert e speaks for a visit of its token to rank r."""
    node_R = np.array(topology.node_R)
    hosts_ER = np.zeros((len(homes), len(node_R)), dtype=np.bool_)
    for expert, home in enumerate(homes):
        hosts_ER[expert, np.array(home) // topology.slots_per_rank] = True
    near_ER = (hosts_ER @ (node_R[:, None] == node_R[None, :])).astype(np.bool_)
    is_single_E1 = np.array([len(home) == 1 for home in homes])[:, None]
    affinity_ER: Floats = np.where(is_single_E1, _ON_NODE * near_ER, _MEET_ON_NODE * near_ER + _MEET_ON_RANK * hosts_ER)
    affinity_ER[hosts_ER & is_single_E1] = _ON_RANK
    if topology.own_node is not None:
        affinity_ER[:, node_R == topology.own_node] += _ON_NODE
    if topology.own_rank is not None:
        affinity_ER[:, topology.own_rank] = _ON_RANK
    return affinity_ER


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


@functools.lru_cache(maxsize=8)
def _turns(num_ranks: int) -> Floats:
    """Float64 [2 * P, R]: Gumbel noise that repeats after P rows.

    The rank with the greatest sum of noise and logarithm of its quota wins as often as its quota says, whatever ranks
    compete (the Gumbel-max trick), and the experts of one token all lean to the same ranks.
    """
    generator = np.random.default_rng(num_ranks)
    uniform_PR = (np.argsort(generator.random((_NUM_TURNS, num_ranks)), axis=0) + 0.5) / _NUM_TURNS
    turn_PR = np.clip(-np.log(-np.log(uniform_PR)), -_TURN_LIMIT, _TURN_LIMIT)
    return np.concatenate([turn_PR, turn_PR])
