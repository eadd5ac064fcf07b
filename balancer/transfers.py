"""From one placement of a layer to the next: what is to be loaded, and from where. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from expertmesh.balancer.policy import Layout
from expertmesh.v1 import mesh_pb2


def plan_transfers(old: Sequence[int], new: Sequence[int], layout: Layout) -> list[mesh_pb2.SlotTransfer]:
    """One transfer for each slot that gets another expert, in the order of slots.

    The source is a slot that holds the expert in ``old``: of the same rank, else of the same node, else of any; among
    equals the rank that has the least to send. Without one the expert comes from the checkpoint. Sources hold the old
    experts until the commit, so a slot may be source and destination at once.

    Args:
        old, new: global slot → expert, -1 = empty. A slot that is emptied loads nothing.
    """
    homes: dict[int, list[int]] = {}
    for slot, expert in enumerate(old):
        homes.setdefault(expert, []).append(slot)
    sends: Counter[int] = Counter()
    transfers = []
    for slot, expert in enumerate(new):
        if expert < 0 or old[slot] == expert:
            continue
        transfer = mesh_pb2.SlotTransfer(slot=slot, expert=expert)
        if expert in homes:
            _, _, source = min((*_distance(home, slot, layout, sends), home) for home in homes[expert])
            sends[source // layout.width] += 1
            transfer.source_slot = source
        transfers.append(transfer)
    return transfers


def _distance(source: int, slot: int, layout: Layout, sends: Counter[int]) -> tuple[int, int]:
    sender, receiver = source // layout.width, slot // layout.width
    if sender == receiver:
        return 0, 0
    return (1 if layout.node_R[sender] == layout.node_R[receiver] else 2), sends[sender]
