"""A trace's tokens on the ranks that a policy's placement sends them to.

Dimensions: L layers, T tokens, K experts of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertmesh.balancer.simulator.draw import draw_tokens
from expertmesh.balancer.simulator.expert_time import RoutedLayer
from expertmesh.balancer.simulator.policies import Policy
from expertmesh.balancer.simulator.score import route_locality_first, route_turns
from expertmesh.balancer.simulator.simulate import split_at
from expertmesh.balancer.simulator.trace import Trace
from expertmesh.balancer.solver.topology import Topology

Ids = NDArray[np.int16]
Floats = NDArray[np.float64]
MAX_ROUTED_TOKENS = 8192
"""Of each part of a trace; longer parts are thinned out evenly."""
MIN_DRAWN_TOKENS = 2048
DRAWN_TOKENS_A_RANK = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedTrace:
    """What placements are solved on, and the tokens before and after the split.

    Args:
        kind: whose choices the tokens are.
    """

    kind: str
    num_experts: int
    load_LE: Floats
    pair_LEE: Floats | None
    before_LTK: Ids
    after_LTK: Ids

    @classmethod
    def of(cls, trace: Trace, top_k: int, num_ranks: int, train_fraction: float, max_layers: int) -> RoutedTrace:
        """At most ``max_layers`` layers of ``trace``. For a load-only one, tokens are drawn, more for more ranks.

        Raises:
            UserError: the split leaves nothing on one side.
        """
        layers = np.unique(np.linspace(0, trace.num_layers - 1, min(max_layers, trace.num_layers)).round().astype(int))
        if trace.topk_LTK is None:
            load_LE = trace.load_LE[layers]
            count = min(max(MIN_DRAWN_TOKENS, DRAWN_TOKENS_A_RANK * num_ranks), MAX_ROUTED_TOKENS)
            drawn_LTK = np.stack([draw_tokens(load_E, top_k, 2 * count, seed) for seed, load_E in enumerate(load_LE)])
            return cls(
                kind="drawn from loads, independently",
                num_experts=trace.num_experts,
                load_LE=load_LE,
                pair_LEE=None,
                before_LTK=drawn_LTK[:, :count],
                after_LTK=drawn_LTK[:, count:],
            )
        split = split_at(trace, train_fraction)
        some = Trace(num_experts=trace.num_experts, topk_LTK=trace.topk_LTK[layers], load_LE=trace.load_LE[layers])
        load_LE, pair_LEE = some.counts(slice(split))
        return cls(
            kind="recorded",
            num_experts=trace.num_experts,
            load_LE=load_LE,
            pair_LEE=pair_LEE,
            before_LTK=_thinned(trace.topk_LTK[layers, :split]),
            after_LTK=_thinned(trace.topk_LTK[layers, split:]),
        )


def _thinned(topk_LTK: Ids) -> Ids:
    return topk_LTK[:, :: -(-topk_LTK.shape[1] // MAX_ROUTED_TOKENS)]


def route(policy: Policy, routed: RoutedTrace, topology: Topology) -> list[RoutedLayer]:
    """The tokens after the split, layer by layer, under the policy's placement."""
    slots_LS = policy.solve(routed.load_LE, routed.pair_LEE, topology)
    found = []
    for slots_S, before_TK, after_TK in zip(slots_LS, routed.before_LTK, routed.after_LTK, strict=True):
        if policy.locality_first:
            rank_TK = route_locality_first(slots_S, after_TK, topology, routed.num_experts, before_TK)
        else:
            rank_TK = route_turns(slots_S, after_TK, topology)
        found.append(RoutedLayer(expert_TK=after_TK.astype(np.int64), rank_TK=rank_TK))
    return found
