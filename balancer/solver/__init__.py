"""Placement of experts, one layer at a time: pure functions over NumPy arrays.

``solve_layer`` places a layer afresh or improves the placement in force within a budget; ``evaluate`` predicts what a
placement does; ``judge`` tells a gain from noise; ``apply_moves`` carries a plan out on a table.
"""

from expertmesh.balancer.solver.counts import count_routing
from expertmesh.balancer.solver.eplb import eplb_global, eplb_hierarchical
from expertmesh.balancer.solver.hysteresis import Verdict, dispersion_of, judge
from expertmesh.balancer.solver.linear import linear
from expertmesh.balancer.solver.moves import FROM_CHECKPOINT, Move, apply_moves, migration_list
from expertmesh.balancer.solver.plan import LayerPlan, evaluate
from expertmesh.balancer.solver.solve import Budget, SolverOptions, solve_layer
from expertmesh.balancer.solver.topology import Topology

__all__ = [
    "FROM_CHECKPOINT",
    "Budget",
    "LayerPlan",
    "Move",
    "SolverOptions",
    "Topology",
    "Verdict",
    "apply_moves",
    "count_routing",
    "dispersion_of",
    "eplb_global",
    "eplb_hierarchical",
    "evaluate",
    "judge",
    "linear",
    "migration_list",
    "solve_layer",
]
