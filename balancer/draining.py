"""``balancer drain``: ask a server to finish what it holds and to leave the mesh."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from expertmesh.balancer.actual import Actual
from expertmesh.balancer.effects import Effects
from expertmesh.balancer.events import EventLog
from expertmesh.balancer.members import Member
from expertmesh.balancer.placement_static import usable_slots
from expertmesh.balancer.refusal import RefusedError
from expertmesh.balancer.scaling_target import ScaleTargets
from expertmesh.v1 import admin_pb2, mesh_pb2


class Draining:
    """The server decides when it goes: an attention server once its requests have ended, and then it says so."""

    def __init__(self, actual: Actual, effects: Effects, events: EventLog, targets: ScaleTargets) -> None:
        self._actual = actual
        self._targets = targets
        self._effects = effects
        self._events = events

    def request(self, request: admin_pb2.DrainRequest) -> None:
        """Ask the server, once more if it was asked before. The target of its role follows.

        Raises:
            RefusedError: there is no such server, it cannot be reached, or without it nothing could be served.
        """
        members = self._actual.members
        member = members.get(request.server_id)
        if member is None or member.lost:
            names = ", ".join(member.server_id for member in members.live()) or "none"
            text = f"server_id: {request.server_id!r} is not in the mesh; it has {names}"
            raise RefusedError(grpc.StatusCode.NOT_FOUND, text)
        if member.session is None:
            text = f"{member.server_id} is not connected now: try again, or stop its process"
            raise RefusedError(grpc.StatusCode.UNAVAILABLE, text)
        others = [other for other in self._actual.staying() if other is not member]
        reason = None if request.force else why_needed(member, others)
        if reason is not None:
            raise RefusedError(grpc.StatusCode.FAILED_PRECONDITION, f"{reason}; force drains it all the same")
        self.ask(member, "an administrator")

    def ask(self, member: Member, by: str) -> None:
        """Ask a connected server, whatever that means for the mesh."""
        assert member.session is not None
        drain = mesh_pb2.Drain(reason=f"{by} asked for it")
        self._effects.send(member.session, mesh_pb2.JoinResponse(drain=drain))
        self._events.add("drain_asked", member.server_id, f"by {by}")
        self._targets.leaves(member, by)


def why_needed(member: Member, others: Sequence[Member]) -> str | None:
    """Why the mesh could not serve without a server; None when it could."""
    if not member.is_rank:
        is_last = not any(other.role_name == member.role_name for other in others)
        return f"{member.server_id} is the last router: clients could reach no other" if is_last else None
    if member.has_attention and not any(other.has_attention for other in others):
        return f"{member.server_id} is the last attention server: start another one first"
    if not member.has_experts:
        return None
    num_experts = member.registration.model.num_experts
    room = usable_slots(num_experts, [other.registration.num_slots for other in others if other.has_experts])
    if room >= num_experts:
        return None
    return (
        f"without {member.server_id} there is room for {room} of the model's {num_experts} experts a layer: start "
        "another expert server first"
    )
