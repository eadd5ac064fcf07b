"""What makes a table slot → expert a placement of one layer in a mesh. Pure; every mistake is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from expertmesh.balancer.policy import Layout
from expertmesh.v1 import mesh_pb2


class PlacementError(ValueError):
    """The table is no placement here; the message says why and of which layer."""


def arrange(
    placement: mesh_pb2.LayerPlacement, slot_servers: Sequence[str], layout: Layout, num_experts: int
) -> mesh_pb2.LayerPlacement:
    """``placement`` in the numbering of the view: the k-th slot that names a server is that server's k-th slot.

    Args:
        slot_servers: server of each slot of ``placement``; empty = it uses the view's own numbering.

    Raises:
        PlacementError: see ``check_experts``; or a server is unknown or has too few slots, or two replicas of an
            expert are on one server.
    """
    servers = slot_servers or [server for server in layout.server_R for _ in range(layout.width)]
    check_experts(placement, servers, num_experts)
    target_of = _targets(placement, servers, layout)
    num_slots = len(layout.room_R) * layout.width
    arranged = mesh_pb2.LayerPlacement(layer=placement.layer, version=placement.version, slots=[-1] * num_slots)
    for slot, target in target_of.items():
        arranged.slots[target] = placement.slots[slot]
    return arranged


def check_experts(placement: mesh_pb2.LayerPlacement, servers: Sequence[str], num_experts: int) -> None:
    """What can be said without knowing the mesh.

    Raises:
        PlacementError: slots and servers are not equally many, an id is out of range, an expert has no slot, or two
            replicas of an expert are on one server.
    """
    layer = f"layer {placement.layer}"
    if len(placement.slots) != len(servers):
        raise PlacementError(f"{layer}: {len(placement.slots)} slots are given, there are {len(servers)}")
    wrong = sorted({expert for expert in placement.slots if not -1 <= expert < num_experts})
    if wrong:
        raise PlacementError(
            f"{layer}: expert {wrong[0]} is out of range: ids go from 0 to {num_experts - 1}, -1 = empty"
        )
    missing = sorted(set(range(num_experts)) - set(placement.slots))
    if missing:
        raise PlacementError(f"{layer}: no slot holds expert {', '.join(map(str, missing))}")
    held = Counter((server, expert) for server, expert in zip(servers, placement.slots, strict=True) if expert >= 0)
    (server, expert), count = held.most_common(1)[0]
    if count > 1:
        raise PlacementError(
            f"{layer}: {server} holds expert {expert} {count} times, a second replica there is of no use"
        )


def _targets(placement: mesh_pb2.LayerPlacement, servers: Sequence[str], layout: Layout) -> dict[int, int]:
    """Slot of ``placement`` that holds an expert → slot of the view."""
    rank_of = {server: rank for rank, server in enumerate(layout.server_R)}
    place: Counter[str] = Counter()
    targets = {}
    for slot, server in enumerate(servers):
        local = place[server]
        place[server] += 1
        if placement.slots[slot] < 0:
            continue
        rank = rank_of.get(server)
        if rank is None:
            known = ", ".join(layout.server_R)
            raise PlacementError(f"layer {placement.layer}: {server} is no expert server of this mesh; it has {known}")
        if local >= layout.room_R[rank]:
            room = layout.room_R[rank]
            raise PlacementError(f"layer {placement.layer}: slot {local} of {server} is filled, it has room for {room}")
        targets[slot] = rank * layout.width + local
    return targets
