"""No move unless its gain beats the noise: how much of a predicted gain counts of finite tokens could fake.

Dimensions: W windows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.plan import LayerPlan
from expertmesh.balancer.solver.topology import Topology

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """``gain`` and ``noise`` in the same unit: the share by which a step of the layer gets shorter, were all of it
    either waiting for the fullest rank or visiting ranks and nodes."""

    gain: float
    noise: float
    worthwhile: bool


def judge(
    now: LayerPlan,
    planned: LayerPlan,
    topology: Topology,
    *,
    tokens: float,
    top_k: float,
    dispersion: float = 1.0,
    min_gain: float = 0.02,
) -> Verdict:
    """Whether ``planned`` is worth its loads, both evaluated on the same counts.

    The fullest of R equal ranks looks fuller than the mean by about ``sqrt(2 ln R)`` standard deviations of a rank's
    count though nothing is wrong, and a search that picks among placements gains about as much for nothing. The same
    holds for visits with the standard deviation of their mean.

    Args:
        now, planned: ``evaluate`` of the placement in force, and the plan.
        tokens: in the counts (the decayed number, where they decay).
        dispersion: variance over mean of the counts; 1 = independent tokens, more where tokens of one request choose
            alike (see ``dispersion_of``).
        min_gain: below this no gain is worth a transfer.
    """
    gain = 1 / now.balancedness - 1 / planned.balancedness
    spread = sqrt(2 * log(max(topology.num_ranks, 2)))
    a_rank = max(tokens, 1.0) * top_k / topology.num_ranks
    noise = spread * sqrt(dispersion / a_rank)
    if now.fanout_ranks is not None and planned.fanout_ranks is not None:
        assert now.fanout_nodes is not None
        assert planned.fanout_nodes is not None
        gain += (now.fanout_ranks - planned.fanout_ranks) / top_k
        gain += (now.fanout_nodes - planned.fanout_nodes) / min(top_k, topology.num_nodes)
        noise += spread * sqrt(dispersion / max(tokens, 1.0))
    return Verdict(gain=gain, noise=noise, worthwhile=gain > noise + min_gain and planned.num_loads > 0)


def dispersion_of(load_WE: Floats) -> float:
    """Variance over mean of the counts of the same traffic in several windows, the median over experts; at least 1."""
    total_W = load_WE.sum(axis=1, keepdims=True)
    expected_WE = total_W * (load_WE.sum(axis=0) / load_WE.sum())
    ratio_E = ((load_WE - expected_WE) ** 2 / np.maximum(expected_WE, 1e-9)).sum(axis=0) / (len(load_WE) - 1)
    return max(float(np.median(ratio_E)), 1.0)
