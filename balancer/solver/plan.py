"""What the solver answers: a placement of one layer, its predicted effect, and the way there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.expected import balancedness, expected_fanout, replica_shares
from expertmesh.balancer.solver.moves import Move, migration_list
from expertmesh.balancer.solver.problem import Problem, build_problem, check_table
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPlan:
    """A placement of one layer, and what it is predicted to do when replicas share their load equally.

    Args:
        slots: int32 [ranks x width], global slot → expert, -1 = empty.
        fanout_ranks, fanout_nodes: visits per token, estimated; None without co-activation.
        moves: from the current placement; empty without one.
        overload: how far the fullest rank is above the load cap, in units of the mean load; 0 = the cap is kept.
    """

    slots: Ints
    balancedness: float
    fanout_ranks: float | None
    fanout_nodes: float | None
    moves: tuple[Move, ...]
    overload: float

    @property
    def num_loads(self) -> int:
        """Slots whose weights have to be loaded."""
        return sum(move.loads for move in self.moves)


def evaluate(
    slots: Ints,
    load_E: Floats,
    coactivation_EE: Floats | None,
    topology: Topology,
    *,
    load_cap: float = 1.02,
    current: Ints | None = None,
) -> LayerPlan:
    """What a given placement is predicted to do on these counts; arguments and errors as for ``solve_layer``."""
    problem = build_problem(load_E, coactivation_EE, topology)
    table_RC = check_table(slots, problem.num_experts, topology)
    if len(np.unique(table_RC[table_RC >= 0])) < problem.num_experts:
        raise ValueError("the placement misses an expert")
    current_RC = None if current is None else check_table(current, problem.num_experts, topology)
    return describe(table_RC, problem, load_cap, current_RC)


def describe(table_RC: Ints, problem: Problem, cap: float, current_RC: Ints | None) -> LayerPlan:
    topology = problem.topology
    shares_RE = replica_shares(table_RC, problem.num_experts)
    load_R = shares_RE @ problem.load_E
    fanout_ranks = fanout_nodes = None
    if problem.has_pairs:
        all_ranks = np.arange(topology.num_ranks, dtype=np.int32)
        shares = (problem.share_E, problem.pair_EE, problem.likeness_EE)
        fanout_ranks = expected_fanout(shares_RE, all_ranks, *shares)
        fanout_nodes = expected_fanout(shares_RE, topology.node_R, *shares)
    slots = table_RC.reshape(-1)
    return LayerPlan(
        slots=slots,
        balancedness=balancedness(load_R),
        fanout_ranks=fanout_ranks,
        fanout_nodes=fanout_nodes,
        moves=() if current_RC is None else migration_list(current_RC.reshape(-1), slots, topology),
        overload=max(float(load_R.max()) - cap * (1 + 1e-9), 0.0),
    )
