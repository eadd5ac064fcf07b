"""The placements that the simulator compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.eplb import eplb_global, eplb_hierarchical
from expertmesh.balancer.solver.linear import linear
from expertmesh.balancer.solver.solve import SolverOptions, solve_layer
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Solve = Callable[[Floats, Floats | None, Topology], Ints]


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """``solve``: loads [L, E] and pair counts [L, E, E] → slots [L, S]. ``locality_first``: how replicas are chosen;
    otherwise they take turns."""

    name: str
    solve: Solve
    locality_first: bool = False


def policies(topology: Topology, num_experts: int) -> tuple[Policy, ...]:
    """Those that can place this many experts on this topology, the baseline first."""
    found = [Policy(name="linear", solve=_linear), Policy(name="eplb", solve=_eplb)]
    if topology.num_nodes > 1 and num_experts % topology.num_nodes == 0:
        found.append(Policy(name="eplb_hierarchical", solve=_eplb_hierarchical))
    found.append(Policy(name="eplb_locality", solve=_eplb, locality_first=True))
    found.append(Policy(name="expertmesh_load", solve=_load_only, locality_first=True))
    found.append(Policy(name="expertmesh", solve=_joint, locality_first=True))
    return tuple(found)


def _linear(load_LE: Floats, pair_LEE: Floats | None, topology: Topology) -> Ints:
    return np.tile(linear(load_LE.shape[1], topology), (len(load_LE), 1))


def _eplb(load_LE: Floats, pair_LEE: Floats | None, topology: Topology) -> Ints:
    return eplb_global(load_LE, topology.num_slots, topology.num_ranks).astype(np.int32)


def _eplb_hierarchical(load_LE: Floats, pair_LEE: Floats | None, topology: Topology) -> Ints:
    # Every expert is a group of its own: a trace does not say whether its model chooses by groups.
    mesh = (topology.num_slots, topology.num_ranks, topology.num_nodes)
    return eplb_hierarchical(load_LE, *mesh, num_groups=load_LE.shape[1]).astype(np.int32)


def _load_only(load_LE: Floats, pair_LEE: Floats | None, topology: Topology) -> Ints:
    return np.stack([solve_layer(load_E, None, topology).slots for load_E in load_LE])


def _joint(load_LE: Floats, pair_LEE: Floats | None, topology: Topology) -> Ints:
    if pair_LEE is None:
        return _load_only(load_LE, None, topology)
    options = SolverOptions()
    layers = zip(load_LE, pair_LEE, strict=True)
    return np.stack([solve_layer(load_E, pair_EE, topology, options).slots for load_E, pair_EE in layers])
