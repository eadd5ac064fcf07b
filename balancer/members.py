"""Who is in the mesh: one record a server, replaced as a whole whenever something about it changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from expertmesh.mesh.view import HOSTS_ATTENTION, HOSTS_EXPERTS
from expertmesh.v1 import mesh_pb2

# They end in logs, events, traces and metrics.
_MAX_CHARS = {
    "server_id": 128,
    "incarnation": 128,
    "node": 256,
    "grpc_address": 256,
    "rank_address": 256,
    "fingerprint": 256,
}
MAX_NUM_SLOTS = 65536
"""Slots a layer that one server may claim: beyond it the registration is a mistake, not a machine."""

ROLE_NAMES = {
    mesh_pb2.ROLE_ATTENTION: "attention",
    mesh_pb2.ROLE_EXPERT: "expert",
    mesh_pb2.ROLE_BOTH: "both",
    mesh_pb2.ROLE_ROUTER: "router",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One incarnation of a server as the balancer sees it.

    Times are seconds of the balancer's monotonic clock.
    """

    registration: mesh_pb2.Registration
    session: int | None  # the open stream, None = closed
    last_seen_s: float  # any message, and the moment its stream closed
    lost: bool = False  # its lease ended or it was fenced: kept for the status only
    draining: bool = False  # it said that it leaves
    ready_view: int = 0  # the view that it says it steps in
    sent_view: int = 0  # the view that it was sent last
    sent_pause: str = ""  # the pause reason that it was sent last
    load: mesh_pb2.ServerLoad | None = None  # as its last heartbeat had it

    @property
    def server_id(self) -> str:
        return self.registration.server_id

    @property
    def incarnation(self) -> str:
        return self.registration.incarnation

    @property
    def key(self) -> tuple[str, str]:
        return self.registration.server_id, self.registration.incarnation

    @property
    def role_name(self) -> str:
        return ROLE_NAMES[self.registration.role]

    @property
    def is_rank(self) -> bool:
        return self.has_attention or self.has_experts

    @property
    def has_attention(self) -> bool:
        return self.registration.role in HOSTS_ATTENTION

    @property
    def has_experts(self) -> bool:
        return self.registration.role in HOSTS_EXPERTS


class Members:
    """The records by server id; a session (one stream) leads to its member as long as it is the member's open one."""

    def __init__(self) -> None:
        self._by_id: dict[str, Member] = {}
        self._by_session: dict[int, str] = {}

    def __iter__(self) -> Iterator[Member]:
        """In the order of server ids, so that every decision is deterministic."""
        return iter([self._by_id[server_id] for server_id in sorted(self._by_id)])

    def get(self, server_id: str) -> Member | None:
        return self._by_id.get(server_id)

    def of_session(self, session: int) -> Member | None:
        server_id = self._by_session.get(session)
        return None if server_id is None else self._by_id[server_id]

    def put(self, member: Member) -> None:
        """Add or replace the record of ``member.server_id``."""
        old = self._by_id.get(member.server_id)
        if old is not None and old.session is not None:
            self._by_session.pop(old.session, None)
        self._by_id[member.server_id] = member
        if member.session is not None:
            self._by_session[member.session] = member.server_id

    def change(self, member: Member, **changes: Any) -> Member:
        changed = replace(member, **changes)
        self.put(changed)
        return changed

    def remove(self, member: Member) -> None:
        if member.session is not None:
            self._by_session.pop(member.session, None)
        del self._by_id[member.server_id]

    def live(self) -> list[Member]:
        return [member for member in self if not member.lost]

    def ranks(self) -> list[Member]:
        return [member for member in self.live() if member.is_rank]


def find_mistake(registration: mesh_pb2.Registration) -> str | None:
    """What is wrong with a registration taken by itself, with the field's name; None when nothing is."""
    if not registration.server_id:
        return "server_id is empty: give the server a name that is unique in the mesh"
    for field, longest in _MAX_CHARS.items():
        value = getattr(registration, field)
        if len(value) > longest or not value.isprintable():
            return f"{field} is {value[:longest]!r}: use at most {longest} printable characters"
    if not registration.incarnation:
        return "incarnation is empty: draw a new one at every process start"
    if registration.role not in ROLE_NAMES:
        return f"role is {registration.role}: register as attention, expert, both or router"
    if registration.role == mesh_pb2.ROLE_ROUTER:
        return None
    if not registration.fingerprint:
        return "fingerprint is empty: send the fingerprint of the checkpoint and dtype"
    if registration.model.num_experts == 0 or not registration.model.moe_layers:
        return "model has no experts or no MoE layers: this mesh serves Mixture-of-Experts models"
    if registration.role in HOSTS_EXPERTS and not 0 < registration.num_slots <= MAX_NUM_SLOTS:
        return (
            f"num_slots is {registration.num_slots}: an expert server has room for 1 to {MAX_NUM_SLOTS} slots a layer"
        )
    if registration.role in HOSTS_ATTENTION and not registration.grpc_address:
        return "grpc_address is empty: routers could not reach this attention server"
    if not registration.rank_address and registration.role != mesh_pb2.ROLE_ROUTER:
        return "rank_address is empty: other ranks could not call this one"
    return None
