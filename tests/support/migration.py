"""Views and plans for the tests of migrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertmesh.mesh.view import ViewInfo
from expertmesh.v1 import mesh_pb2

ROLES = {"a": mesh_pb2.ROLE_ATTENTION, "e": mesh_pb2.ROLE_EXPERT, "b": mesh_pb2.ROLE_BOTH}


def make_view(
    roles: str, slots: Mapping[int, Sequence[int]], *, num_slots: int, rank: int = 0, number: int = 3
) -> ViewInfo:
    """A view of one rank for each letter of ``roles`` (a, e, b), all layers at version 1.

    ``slots``: layer → global slot → expert; ``num_slots``: of each expert rank.
    """
    view = mesh_pb2.View(number=number, slots_per_rank=num_slots, secret=b"secret")
    for index, role in enumerate(roles):
        view.ranks.add(
            rank=index,
            server_id=f"{role}{index}",
            incarnation="1",
            role=ROLES[role],
            node="node-0",
            num_slots=0 if role == "a" else num_slots,
        )
    for layer, experts in slots.items():
        view.placement.add(layer=layer, version=1, slots=experts)
    return ViewInfo(view, rank)


def make_plan(
    plan_id: int,
    view: ViewInfo,
    layer: int,
    slots: Sequence[int],
    *,
    from_checkpoint: bool = False,
    timeout_s: float = 5.0,
) -> mesh_pb2.MigrationPlan:
    """From the placement that runs to ``slots``; each expert comes from the first slot that holds it."""
    old = next(placement for placement in view.proto.placement if placement.layer == layer)
    plan = mesh_pb2.MigrationPlan(
        id=plan_id,
        view_number=view.number,
        placement=mesh_pb2.LayerPlacement(layer=layer, version=old.version + 1, slots=slots),
        timeout_s=timeout_s,
    )
    held = list(old.slots)
    for slot, expert in enumerate(slots):
        if expert >= 0 and (slot >= len(held) or held[slot] != expert):
            transfer = plan.transfers.add(slot=slot, expert=expert)
            if expert in held and not from_checkpoint:
                transfer.source_slot = held.index(expert)
    return plan
