"""One layer's problem in the solver's units, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Loads in units of the mean load of a rank; pairs as the share of all tokens that choose both experts."""

    load_E: Floats
    share_E: Floats
    """share of all tokens that choose an expert; sums to the experts of a token"""
    pair_EE: Floats
    """symmetric, diagonal 0"""
    likeness_EE: Floats
    """``pair_EE`` over the geometric mean of the two experts' shares"""
    has_pairs: bool
    floor_E: Ints
    """replicas that each expert has at least"""
    topology: Topology

    @property
    def num_experts(self) -> int:
        return len(self.load_E)


def build_problem(
    load_E: Floats, coactivation_EE: Floats | None, topology: Topology, floor_E: Ints | None = None
) -> Problem:
    """
    Raises:
        ValueError: fewer usable slots than experts, or than the replicas of ``floor_E``, other shapes than [E] and
            [E, E], or a number that is negative or not finite.
    """
    load_E = np.ascontiguousarray(load_E, np.float64)
    if load_E.ndim != 1 or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError("load_E must hold one finite number for each expert, none negative")
    num_experts, total = len(load_E), float(load_E.sum())
    if topology.usable_slots(num_experts) < num_experts:
        raise ValueError(f"{topology.usable_slots(num_experts)} usable slots a layer for {num_experts} experts")
    floor_E = np.ones(num_experts, np.int32) if floor_E is None else np.ascontiguousarray(floor_E, np.int32)
    has_room = floor_E.sum() <= topology.usable_slots(num_experts)
    if not has_room or not 1 <= floor_E.min() <= floor_E.max() <= topology.num_ranks:
        raise ValueError(f"floor_E asks for {floor_E.sum()} replicas, {floor_E.max()} of one expert: they have no room")
    pair_EE, pairs = np.zeros((num_experts, num_experts)), 0.0
    if coactivation_EE is not None and total > 0:
        pair_EE, pairs = _pairs(coactivation_EE, num_experts)
    # Without any load all experts count the same, so that replicas spread evenly.
    load_E = load_E / total if total > 0 else np.full(num_experts, 1.0 / num_experts)
    # K from the counts alone: of every chosen expert, each token has K - 1 pairs.
    per_token = 1.0 + pairs / total if total > 0 else 1.0
    share_E = load_E * per_token
    return Problem(
        load_E=load_E * topology.num_ranks,
        share_E=share_E,
        pair_EE=pair_EE,
        likeness_EE=_likeness(pair_EE, per_token / total if total > 0 else 0.0, share_E),
        has_pairs=pairs > 0,
        floor_E=floor_E,
        topology=topology,
    )


def _pairs(coactivation_EE: Floats, num_experts: int) -> tuple[Floats, float]:
    """The pair counts [E, E] made symmetric, diagonal 0, and their sum."""
    counts_EE = np.ascontiguousarray(coactivation_EE, np.float64)
    if counts_EE.shape == (num_experts, num_experts):
        pair_EE, total = _symmetric(counts_EE)
        if total >= 0:
            return pair_EE, total
    raise ValueError(f"coactivation_EE must be {num_experts} x {num_experts}, finite, none negative")


@compiled
def _symmetric(counts_EE: Floats) -> tuple[Floats, float]:
    """See ``_pairs``; the sum is -1 where a count is negative or not finite."""
    pair_EE, total, valid = np.zeros_like(counts_EE), 0.0, True
    for e in range(len(counts_EE)):
        valid &= 0.0 <= counts_EE[e, e] < np.inf
        for f in range(e):
            valid &= 0.0 <= counts_EE[e, f] < np.inf and 0.0 <= counts_EE[f, e] < np.inf
            pair_EE[e, f] = pair_EE[f, e] = (counts_EE[e, f] + counts_EE[f, e]) / 2
            total += counts_EE[e, f] + counts_EE[f, e]
    return pair_EE, total if valid else -1.0


@compiled
def _likeness(pair_EE: Floats, scale: float, share_E: Floats) -> Floats:
    """``Problem.likeness_EE``, with ``pair_EE`` scaled in place first."""
    likeness_EE, inverse_E = np.zeros_like(pair_EE), np.zeros_like(share_E)
    for e in range(len(share_E)):
        inverse_E[e] = 1.0 / np.sqrt(share_E[e]) if share_E[e] > 0 else 0.0
    for e in range(len(share_E)):
        for f in range(len(share_E)):
            pair_EE[e, f] *= scale
            likeness_EE[e, f] = pair_EE[e, f] * inverse_E[e] * inverse_E[f]
    return likeness_EE


def check_table(slots: Ints, num_experts: int, topology: Topology) -> Ints:
    """``slots`` as a table [R, width].

    Raises:
        ValueError: another number of slots than the topology has, an unknown expert, or a slot beyond a rank's own.
    """
    slots = np.ascontiguousarray(slots, np.int32)
    if slots.size != topology.num_ranks * topology.width:
        raise ValueError(f"{slots.size} slots for {topology.num_ranks} ranks of {topology.width}")
    if slots.min() < -1 or slots.max() >= num_experts:
        raise ValueError(f"slots hold experts {slots.min()} to {slots.max()}, the layer has {num_experts}")
    table_RC = slots.reshape(topology.num_ranks, topology.width)
    if (table_RC[np.arange(topology.width) >= topology.room_R[:, None]] >= 0).any():
        raise ValueError("an expert lies in a slot that its rank does not have")
    return table_RC
