"""The loads of a view as an administrator sees them: statistics against the placement that is in force. Pure.

Dimensions: R expert ranks, G global slots.
"""

from __future__ import annotations

import numpy as np

from expertmesh.balancer.policy import Floats
from expertmesh.balancer.statistics import Statistics
from expertmesh.mesh.view import HOSTS_EXPERTS
from expertmesh.v1 import admin_pb2, mesh_pb2


def view_loads(view: mesh_pb2.View, num_experts: int, statistics: Statistics) -> admin_pb2.GetLoadsResponse:
    """Every layer that the view places; one without statistics has no tokens, no load, and nothing out of balance."""
    servers = [rank.server_id for rank in view.ranks if rank.role in HOSTS_EXPERTS]
    return admin_pb2.GetLoadsResponse(
        layers=[_layer_loads(view, placement, num_experts, statistics) for placement in view.placement],
        expert_servers=servers,
    )


def balancedness(rank_load_R: Floats) -> float:
    """Mean / max; 1 while there is no load."""
    largest = float(rank_load_R.max(initial=0.0))
    return float(rank_load_R.mean()) / largest if largest else 1.0


def _layer_loads(
    view: mesh_pb2.View, placement: mesh_pb2.LayerPlacement, num_experts: int, statistics: Statistics
) -> admin_pb2.LayerLoads:
    load_E, visits = statistics.layer_load(placement.layer), statistics.visits(placement.layer)
    if load_E is None or visits is None:
        ranks = len(placement.slots) // view.slots_per_rank
        return admin_pb2.LayerLoads(
            layer=placement.layer, load=[0.0] * num_experts, balancedness=1.0, rank_load=[0.0] * ranks
        )
    is_measured = (visits.view_number, visits.version) == (view.number, placement.version) and visits.tokens > 0
    slot_load_G = visits.slot_load_G if is_measured else _expected_slot_load(placement, load_E)
    rank_load_R = slot_load_G.reshape(-1, view.slots_per_rank).sum(axis=1)
    return admin_pb2.LayerLoads(
        layer=placement.layer,
        load=load_E.tolist(),
        balancedness=balancedness(rank_load_R),
        fanout_ranks=visits.rank_visits / visits.tokens if is_measured else 0.0,
        fanout_nodes=visits.node_visits / visits.tokens if is_measured else 0.0,
        tokens=statistics.tokens(placement.layer),
        rank_load=rank_load_R.tolist(),
    )


def _expected_slot_load(placement: mesh_pb2.LayerPlacement, load_E: Floats) -> Floats:
    """Until tokens have been counted under a new placement: each expert's load, shared out equally."""
    expert_G = np.array(placement.slots, np.int64)
    held_G = expert_G >= 0
    count_E = np.bincount(expert_G[held_G], minlength=len(load_E))
    slot_load_G: Floats = np.where(held_G, (load_E / np.maximum(count_E, 1))[expert_G], 0.0)
    return slot_load_G
