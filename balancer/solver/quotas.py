"""Quotas: which share of its expert's tokens each replica gets, so that ranks are level though traffic has drifted.

Equal shares suit the loads that a placement was made for. For other loads, other shares level the ranks as far as
replicas reach, and nothing has to be loaded for it. Of an unequal share routing has to send more tokens out of their
way than of an equal one, so quotas leave the equal shares only as far as that takes much off the fullest ranks.

Dimensions: E experts, R ranks, C slots of the widest rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.solver.compiled import compiled

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

STIFFNESS = 0.2
"""Of the equal shares: from 0.1 to 0.5 balance gained most for what it cost in visits, on gpt-oss-20b's tokens."""
SWEEPS = 50
SETTLED = 1e-5
"""Of the mean load of a rank: the largest change of a sweep that ends the descent."""


@compiled
def balanced_quotas(table_RC: Ints, load_E: Floats) -> Floats:
    """Share of its expert's load for each slot, float64 [R, C], 0 = empty; those of an expert add up to 1.

    They minimise the sum of squares of the ranks' loads plus ``STIFFNESS`` times that of the replicas' distances from
    their equal shares, by coordinate descent over the experts: one expert's best shares are found exactly by filling
    its ranks up to a common level. A convex problem, so it ends at the optimum.

    Args:
        table_RC: slot → expert, -1 = empty; every expert has a slot.
        load_E: in any unit, none negative.
    """
    order_S, start_E = _slots_by_expert(table_RC, len(load_E))
    width, scale = table_RC.shape[1], load_E.sum() / len(table_RC)
    quota_S, load_R = np.zeros(table_RC.size), np.zeros(len(table_RC))
    for e in range(len(load_E)):
        for s in order_S[start_E[e] : start_E[e + 1]]:
            quota_S[s] = 1.0 / (start_E[e + 1] - start_E[e])
            load_R[s // width] += load_E[e] * quota_S[s]
    most = scale
    for _ in range(SWEEPS):
        if most <= SETTLED * scale:
            break
        most = 0.0
        for e in range(len(load_E)):
            slots_W = order_S[start_E[e] : start_E[e + 1]]
            if len(slots_W) < 2 or load_E[e] == 0:
                continue
            load_W = quota_S[slots_W] * load_E[e]
            filled_W = _fill(load_R[slots_W // width] - load_W - STIFFNESS * load_E[e] / len(slots_W), load_E[e])
            most = max(most, np.abs(filled_W - load_W).max())
            load_R[slots_W // width] += filled_W - load_W  # an expert's slots are on different ranks
            quota_S[slots_W] = filled_W / load_E[e]
    return quota_S.reshape(table_RC.shape)


@compiled
def _slots_by_expert(table_RC: Ints, num_experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The filled slots in the order of their experts, and where each expert's begin in it [E + 1]."""
    expert_S = table_RC.ravel()
    order_S = np.argsort(expert_S, kind="mergesort")
    order_S = order_S[(expert_S < 0).sum() :]
    return order_S, np.searchsorted(expert_S[order_S], np.arange(num_experts + 1))


@compiled
def _fill(base_W: Floats, load: float) -> Floats:
    """x >= 0 with the sum ``load`` that minimises the sum of (1 + STIFFNESS) x² / 2 + base x."""
    ascending_W = np.sort(base_W)
    level = 0.0
    for used in range(len(base_W), 0, -1):
        level = (load * (1 + STIFFNESS) + ascending_W[:used].sum()) / used
        if level > ascending_W[used - 1]:
            break
    return np.maximum(level - base_W, 0.0) / (1 + STIFFNESS)


def quota_loads(table_RC: Ints, quota_RC: Floats, load_E: Floats) -> Floats:
    """Load of each rank [R] when replicas share by these quotas."""
    load_R: Floats = (np.where(table_RC >= 0, load_E[table_RC], 0.0) * quota_RC).sum(axis=1)
    return load_R
