"""Solve one layer: from loads and co-activation to a placement and what it takes to get there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.anneal import Goal, anneal, total_savings
from expertmesh.balancer.solver.balance import level, min_max_replicas, pack
from expertmesh.balancer.solver.expected import TRIPLE_WEIGHT, held_experts, rank_loads
from expertmesh.balancer.solver.plan import LayerPlan, describe
from expertmesh.balancer.solver.problem import Problem, build_problem, check_table
from expertmesh.balancer.solver.relabel import keep_slots, relabel
from expertmesh.balancer.solver.relieve import relieve
from expertmesh.balancer.solver.search_state import SearchState, build_state
from expertmesh.balancer.solver.topology import Topology

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
UNLIMITED = 1 << 40
LEVEL_TOLERANCE = 5e-4
HOT, COLD = 0.6, 0.02
"""Temperatures in units of a typical gain, found on gpt-oss-20b and on 256 synthetic experts."""
LONG = 200
"""Proposals a slot from which a search has the time to start at ``HOT``; shorter ones start cooler."""
REPLACE_SHARE = 0.1
"""Of the proposals that hit a replica, those that put another expert there."""
EXCESS_WEIGHT, FORBIDDING = 75.0, 1e6
"""Worth of load above the cap while the search is hot, in typical gains for the mean load of a rank; and at its end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    """What a placement is judged by, and how much work goes into finding it.

    Args:
        load_slack: a rank may carry this much more than the mean, relative; where even the load-only solution cannot
            do with that, its fullest rank is the cap.
        load_cap: the cap itself in units of the mean, instead of ``load_slack``.
        flexible_share: of the mean load, what every rank should carry of replicated experts, so that routing can shift
            it when traffic drifts; wished for, not guaranteed.
        rank_weight, node_weight: price of one visit of a rank and of a node.
        proposals: length of one search; time grows with it, about 0.5 µs each.
        restarts: searches with other random numbers; the best one counts.
        seed: of the random numbers.
    """

    load_slack: float = 0.015
    load_cap: float | None = None
    flexible_share: float = 0.3
    rank_weight: float = 1.0
    node_weight: float = 0.5
    proposals: int = 16_000
    restarts: int = 1
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How much one layer may load.

    Args:
        slots: at most so many slots.
        num_bytes: at most so many bytes of weights, at ``bytes_per_expert`` a slot.
        move_cost: weighted visits per token that a loaded slot has to save.
    """

    slots: int = UNLIMITED
    num_bytes: int | None = None
    bytes_per_expert: int = 0
    move_cost: float = 0.0

    @property
    def loads(self) -> int:
        """Slots that may be loaded."""
        if self.num_bytes is None or self.bytes_per_expert == 0:
            return self.slots
        return min(self.slots, self.num_bytes // self.bytes_per_expert)


def solve_layer(
    load_E: Floats,
    coactivation_EE: Floats | None,
    topology: Topology,
    options: SolverOptions | None = None,
    *,
    current: Ints | None = None,
    budget: Budget | None = None,
    floor_E: Ints | None = None,
) -> LayerPlan:
    """Place the experts of one layer.

    Args:
        load_E: tokens per expert, in any unit, finite and not negative.
        coactivation_EE: tokens that chose both experts, in the unit of ``load_E``; the diagonal is ignored. None:
            only the load counts.
        current: global slot → expert of the placement in force. The plan keeps in place what it can.
        budget: incremental mode: improve ``current`` within it, filling its empty slots where that pays. Without one
            the layer is solved afresh, and ``current`` only decides which rank gets which part.
        floor_E: replicas that each expert has at least, int32, one where it is None: what ``current`` has of them
            stays, and a plan made afresh has them where the packing finds room.

    Raises:
        ValueError: fewer usable slots than experts, arrays of other shapes, numbers that are negative or not finite,
            or a ``current`` that is no placement of these experts.
    """
    options = options or SolverOptions()
    problem = build_problem(load_E, coactivation_EE, topology, floor_E)
    current_RC = None if current is None else check_table(current, problem.num_experts, topology)
    if budget is None or current_RC is None:
        table_RC, cap = _solve_afresh(problem, options)
        if current_RC is not None:
            table_RC = relabel(table_RC, current_RC, topology, problem.num_experts)
    else:
        cap = options.load_cap or 1.0 + options.load_slack
        table_RC = _improve(problem, options, cap, current_RC, budget)
    return describe(table_RC, problem, cap, current_RC)


def _solve_afresh(problem: Problem, options: SolverOptions) -> tuple[Ints, float]:
    """A placement without regard to the one in force, and the load cap that it keeps unless a given cap cannot be."""
    topology = problem.topology
    usable = topology.usable_slots(problem.num_experts)
    replicas_E = min_max_replicas(problem.load_E, usable, topology.num_ranks, problem.floor_E)
    table_RC = pack(problem.load_E, replicas_E, topology.room_R, topology.width)
    level(table_RC, problem.load_E, LEVEL_TOLERANCE, 4 * usable)
    fullest = float(rank_loads(table_RC, problem.load_E).max())
    cap = options.load_cap or max(1.0 + options.load_slack, fullest)
    if not problem.has_pairs:
        return table_RC, cap
    held_before_RE = np.ones((topology.num_ranks, problem.num_experts), np.bool_)
    best_RC, best = table_RC, -np.inf
    for restart in range(options.restarts):
        state = _search(problem, options, table_RC, held_before_RE, cap, 0.0, UNLIMITED, restart)
        level(state.table_RC, problem.load_E, max(cap - 1.0, 0.0), 4 * usable)
        kept = rank_loads(state.table_RC, problem.load_E).max() <= max(cap, fullest) * (1 + 1e-9)
        saved = total_savings(state, _goal(options, cap))
        if kept and saved > best:
            best_RC, best = state.table_RC, saved
    return best_RC, cap


def _improve(problem: Problem, options: SolverOptions, cap: float, current_RC: Ints, budget: Budget) -> Ints:
    """``current_RC`` changed within the budget; it must hold every expert, and no rank one twice."""
    held_RE = held_experts(current_RC, problem.num_experts)
    if not held_RE.any(axis=0).all() or held_RE.sum() < (current_RC >= 0).sum():
        raise ValueError("the current placement misses an expert, or a rank holds one twice: solve without a budget")
    loads = min(budget.loads, UNLIMITED)
    table_RC = current_RC.copy()
    # Load first: a search that may trade it for visits spends a small budget on the visits.
    relieve(table_RC, problem.topology.room_R, problem.load_E, held_RE, problem.floor_E, cap, loads, budget.move_cost)
    if problem.has_pairs:
        fullest = float(rank_loads(table_RC, problem.load_E).max())
        table_RC = _search(problem, options, table_RC, held_RE, max(cap, fullest), budget.move_cost, loads, 0).table_RC
    return keep_slots(table_RC, current_RC, problem.topology)


def _goal(options: SolverOptions, cap: float) -> Goal:
    return Goal(
        cap=float(cap),
        fixed_cap=1.0 - options.flexible_share,
        rank_weight=float(options.rank_weight),
        node_weight=float(options.node_weight),
        triple_weight=TRIPLE_WEIGHT,
        excess_weight=0.0,
        move_cost=0.0,
        hard=False,
        budget=UNLIMITED,
    )


def _search(
    problem: Problem,
    options: SolverOptions,
    table_RC: Ints,
    held_before_RE: NDArray[np.bool_],
    cap: float,
    move_cost: float,
    loads: int,
    restart: int,
) -> SearchState:
    topology = problem.topology
    state = build_state(
        table_RC.copy(),
        topology.room_R,
        topology.node_R,
        topology.num_nodes,
        problem.load_E,
        problem.pair_EE,
        problem.likeness_EE,
        held_before_RE,
        problem.floor_E,
    )
    gain = _typical_gain(problem, options)
    goal = _goal(options, cap)._replace(excess_weight=EXCESS_WEIGHT * gain, move_cost=float(move_cost), budget=loads)
    seed = np.array([(options.seed * 1_000_003 + restart + 1) * 0x9E3779B97F4A7C15 % 2**64 or 1], np.uint64)
    hot = max(HOT * min(options.proposals / (LONG * topology.num_slots), 1.0), 2 * COLD)
    anneal(state, goal, options.proposals, hot * gain, COLD * gain, REPLACE_SHARE, seed)
    goal = goal._replace(excess_weight=FORBIDDING * gain, hard=True)
    anneal(state, goal, options.proposals // 4, 0.0, 0.0, REPLACE_SHARE, seed)
    return state


def _typical_gain(problem: Problem, options: SolverOptions) -> float:
    """What moving an expert gains or loses in root mean square, were pairs independent: a scale for temperatures."""
    topology = problem.topology
    pair = float(np.sqrt((problem.pair_EE**2).mean()))
    per_rank = topology.num_slots / topology.num_ranks
    per_node = topology.num_slots / topology.num_nodes if topology.num_nodes > 1 else 0.0
    return float(pair * (options.rank_weight * per_rank**0.5 + options.node_weight * per_node**0.5))
