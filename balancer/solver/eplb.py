"""DeepSeek's EPLB, written from its description (github.com/deepseek-ai/EPLB, README), all layers at once in NumPy.

The baseline of the simulator and a policy to choose. Global: replicate the expert whose replicas carry most until all
slots are used, then pack heaviest first onto the least loaded rank with room. Hierarchical: groups of experts onto
nodes first, then the same within each node. It may put two replicas of an expert on one rank, as the original does.

Dimensions: L layers, E experts, G groups, N nodes, R ranks, S slots.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]


def eplb_global(load_LE: Floats, num_slots: int, num_ranks: int) -> Ids:
    """Slot → expert, int64 [L, S]; rank r owns slots r·S/R … (r+1)·S/R - 1. ``num_slots`` divides by ``num_ranks``."""
    return eplb_hierarchical(load_LE, num_slots, num_ranks, num_nodes=1, num_groups=1)


def eplb_hierarchical(load_LE: Floats, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int) -> Ids:
    """As ``eplb_global``, with the experts of a group on one node.

    E divides by ``num_groups``, that by ``num_nodes``; ``num_slots`` divides by ``num_ranks``, that by ``num_nodes``.
    """
    num_layers, num_experts = load_LE.shape
    assert num_experts % num_groups == num_groups % num_nodes == 0
    assert num_slots % num_ranks == num_ranks % num_nodes == 0
    group_size, per_node = num_experts // num_groups, num_experts // num_nodes
    group_load_LG = load_LE.reshape(num_layers, num_groups, group_size).sum(axis=2)
    groups_LNg = _pack_evenly(group_load_LG, num_nodes)
    expert_LNe = (groups_LNg[..., None] * group_size + np.arange(group_size)).reshape(num_layers, num_nodes, per_node)
    # From here on a (layer, node) is a problem of its own.
    expert_Me = expert_LNe.reshape(num_layers * num_nodes, per_node)
    load_Me = np.take_along_axis(load_LE, expert_LNe.reshape(num_layers, -1), axis=1).reshape(expert_Me.shape)
    local_Ms, share_Ms = _replicate(load_Me, num_slots // num_nodes)
    slot_Mrc = _pack_evenly(share_Ms, num_ranks // num_nodes)
    local_Ms = np.take_along_axis(local_Ms, slot_Mrc.reshape(local_Ms.shape), axis=1)
    return np.take_along_axis(expert_Me, local_Ms, axis=1).reshape(num_layers, num_slots)


def _pack_evenly(load_MI: Floats, num_packs: int) -> Ids:
    """Items of each pack, [M, packs, items a pack]: heaviest first, to the lightest pack that has room."""
    num_rows, num_items = load_MI.shape
    size = num_items // num_packs
    items_MPs = np.empty((num_rows, num_packs, size), np.int64)
    load_MP = np.zeros((num_rows, num_packs))
    used_MP = np.zeros((num_rows, num_packs), np.int64)
    rows = np.arange(num_rows)
    for item_M in np.argsort(-load_MI, axis=1, kind="stable").T:
        pack_M = np.where(used_MP < size, load_MP, np.inf).argmin(axis=1)
        items_MPs[rows, pack_M, used_MP[rows, pack_M]] = item_M
        load_MP[rows, pack_M] += load_MI[rows, item_M]
        used_MP[rows, pack_M] += 1
    return items_MPs


def _replicate(load_ME: Floats, num_slots: int) -> tuple[Ids, Floats]:
    """The expert in each of ``num_slots`` slots and the load of that replica, [M, slots] both."""
    num_rows, num_experts = load_ME.shape
    replicas_ME = np.ones((num_rows, num_experts), np.int64)
    expert_MS = np.tile(np.arange(num_slots), (num_rows, 1))
    rows = np.arange(num_rows)
    for slot in range(num_experts, num_slots):
        expert_M = (load_ME / replicas_ME).argmax(axis=1)
        expert_MS[:, slot] = expert_M
        replicas_ME[rows, expert_M] += 1
    return expert_MS, np.take_along_axis(load_ME / replicas_ME, expert_MS, axis=1)
