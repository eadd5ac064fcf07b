"""One layer's problem in the solver's units, checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.expected import experts_per_token, likeness
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
    likeness_EE: Floats
    topology: Topology

    @property
    def num_experts(self) -> int:
        return len(self.load_E)

    @property
    def has_pairs(self) -> bool:
        return bool(self.pair_EE.any())


def build_problem(load_E: Floats, coactivation_EE: Floats | None, topology: Topology) -> Problem:
    """
    Raises:
        ValueError: fewer usable slots than experts, other shapes than [E] and [E, E], or a number that is negative or
            not finite.
    """
    load_E = np.ascontiguousarray(load_E, np.float64)
    if load_E.ndim != 1 or not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError("load_E must hold one finite number for each expert, none negative")
    num_experts, total = len(load_E), float(load_E.sum())
    if topology.usable_slots(num_experts) < num_experts:
        raise ValueError(f"{topology.usable_slots(num_experts)} usable slots a layer for {num_experts} experts")
    pair_EE = np.zeros((num_experts, num_experts))
    if coactivation_EE is not None and total > 0:
        pair_EE = _pairs(coactivation_EE, num_experts) / total
    # Without any load all experts count the same, so that replicas spread evenly.
    load_E = load_E / total if total > 0 else np.full(num_experts, 1.0 / num_experts)
    per_token = experts_per_token(load_E, pair_EE)
    share_E, pair_EE = load_E * per_token, pair_EE * per_token
    return Problem(
        load_E=load_E * topology.num_ranks,
        share_E=share_E,
        pair_EE=pair_EE,
        likeness_EE=likeness(share_E, pair_EE),
        topology=topology,
    )


def _pairs(coactivation_EE: Floats, num_experts: int) -> Floats:
    pair_EE = np.array(coactivation_EE, np.float64)
    if pair_EE.shape != (num_experts, num_experts) or not np.isfinite(pair_EE).all() or (pair_EE < 0).any():
        raise ValueError(f"coactivation_EE must be {num_experts} x {num_experts}, finite, none negative")
    np.fill_diagonal(pair_EE, 0.0)
    return (pair_EE + pair_EE.T) / 2


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
