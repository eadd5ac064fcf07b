"""The optimal fan-out beside the policies', where the integer program can be solved."""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.bounds import NotSolvedError, least_fanout
from expertmesh.balancer.simulator.score import LayerScore
from expertmesh.balancer.simulator.trace import Trace
from expertmesh.balancer.solver.topology import Topology
from expertmesh.mesh.errors import UserError

log = logging.getLogger(__name__)

MAX_SETS = 200_000
"""Columns of the integer program: 32 experts on 8 ranks make 35,960, which take seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optima:
    """Layer → fewest ranks a token, where it was solved; ``cap_L``: tokens that a rank may carry."""

    of_layer: dict[int, float]
    cap_L: list[float]


def check_optimum(trace: Trace, topology: Topology) -> None:
    """
    Raises:
        UserError: the optimum cannot be found: the trace has no tokens, there are replicas or too many sets of experts
            to choose from, or scipy is missing.
    """
    if trace.topk_LTK is None or (trace.topk_LTK < 0).any():
        problem = "the trace has loads alone" if trace.topk_LTK is None else "not every token chooses equally many"
        raise UserError("--optimum", problem, "give a trace of tokens as `expertmesh balancer record` makes it")
    experts, per_rank = trace.num_experts, topology.num_slots // topology.num_ranks
    if topology.num_slots != experts:
        problem = f"{topology.num_slots} slots for {experts} experts make replicas, with which no optimum is known"
        raise UserError("--optimum", problem, f"give --slots {experts}, or leave --optimum out")
    if comb(experts, per_rank) > MAX_SETS:
        problem = f"there are {comb(experts, per_rank):.2g} sets of {per_rank} experts, {MAX_SETS:,} are tried at most"
        raise UserError("--optimum", problem, "give more --ranks, or leave --optimum out")
    if importlib.util.find_spec("scipy") is None:
        remedy = "install it with `pip install 'expertmesh[optimum]'`"
        raise UserError("--optimum", "needs scipy, for its integer programming (HiGHS)", remedy)


def find_optima(
    topk_LTK: NDArray[np.int16],
    num_experts: int,
    per_rank: int,
    scores_of: dict[str, list[LayerScore]],
    seconds: float,
) -> Optima:
    """Layer after layer until the time is up. The cap of a layer is what EPLB or the solver gives its fullest rank,
    whichever is more: a bound for both of them, and for no policy that loads a rank more."""
    deadline = time.monotonic() + seconds
    of_layers = zip(scores_of["eplb"], scores_of["expertmesh"], strict=True)
    cap_L = [max(float(score.load_R.max()) for score in scores) for scores in of_layers]
    found: dict[int, float] = {}
    for layer, topk_TK in enumerate(topk_LTK):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        try:
            found[layer] = least_fanout(topk_TK, num_experts, per_rank, cap_L[layer], left_s)
        except NotSolvedError as error:
            log.info("layer %d has no optimum: %s", layer, error)
    return Optima(of_layer=found, cap_L=cap_L)
