"""Who may register. Pure: the reconciler acts on the verdict."""

from __future__ import annotations

import hmac
from collections.abc import Container
from dataclasses import dataclass

import grpc

from expertmesh.balancer.members import Members, find_mistake
from expertmesh.v1 import mesh_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcomed:
    """The server is a member now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The stream ends with this status."""

    code: grpc.StatusCode
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Over:
    """The incarnation is over: the server hears Fenced and registers as a new one."""

    reason: str


Verdict = Welcomed | Refused | Over


def judge(
    registration: mesh_pb2.Registration,
    *,
    members: Members,
    view: mesh_pb2.View,
    may_adopt: bool,
    fingerprint: str,
    fenced: Container[str],
) -> Verdict:
    """
    Args:
        view: the view published last.
        may_adopt: no view is under way, or one is being adopted: servers may bring theirs.
        fingerprint: the mesh's, '' while it has none.
        fenced: incarnations that are over.
    """
    mistake = find_mistake(registration)
    if mistake is not None:
        return Refused(code=grpc.StatusCode.INVALID_ARGUMENT, message=mistake)
    if registration.incarnation in fenced:
        return Over(reason="this incarnation was replaced or given up by the mesh")
    if registration.fingerprint and fingerprint and registration.fingerprint != fingerprint:
        return Refused(
            code=grpc.StatusCode.FAILED_PRECONDITION,
            message=f"{registration.server_id} has the model fingerprint {registration.fingerprint}, this mesh runs "
            f"{fingerprint}: give every server the same checkpoint and dtype, or stop the other servers first",
        )
    known = members.get(registration.server_id)
    is_new = known is None or known.lost or known.incarnation != registration.incarnation
    if known is not None and not is_new and not _same_process(known.registration, registration):
        return Refused(
            code=grpc.StatusCode.PERMISSION_DENIED,
            message=f"{registration.server_id} is in the mesh, and this is not the process that registered it: give "
            "every server an id of its own; if it is one, somebody replays its registration",
        )
    if known is not None and is_new and not known.lost and known.session is not None:
        return Refused(
            code=grpc.StatusCode.ALREADY_EXISTS,
            message=f"another {registration.server_id} is in the mesh and alive (pid {known.registration.pid} on "
            f"{known.registration.node}): stop it or choose another server id",
        )
    if is_new and registration.view_number and registration.role != mesh_pb2.ROLE_ROUTER:
        adopting = may_adopt and (is_in(view, registration) or brings_view(registration, view))
        if not adopting:
            return Over(reason=f"view {registration.view_number} is over for {registration.server_id}")
    return Welcomed()


def _same_process(one: mesh_pb2.Registration, other: mesh_pb2.Registration) -> bool:
    """Incarnations are known to all who see a view; their secret to the process and the balancer alone."""
    return hmac.compare_digest(one.incarnation_secret, other.incarnation_secret)


def is_in(view: mesh_pb2.View, registration: mesh_pb2.Registration) -> bool:
    """Whether this incarnation is a rank of the view."""
    return any(
        rank.server_id == registration.server_id and rank.incarnation == registration.incarnation for rank in view.ranks
    )


def brings_view(registration: mesh_pb2.Registration, last: mesh_pb2.View) -> bool:
    """Whether the server brings a running view that is ``last`` or newer, and proves that it is in it."""
    brought = registration.view
    return (
        brought.number == registration.view_number > 0
        and (brought.number > last.number or _same_view(brought, last))
        and len(brought.secret) > 0
        and hmac.compare_digest(brought.secret, registration.view_secret)
        and is_in(brought, registration)
    )


def _same_view(one: mesh_pb2.View, other: mesh_pb2.View) -> bool:
    """The placement of a view may have moved on."""
    without = [mesh_pb2.View.FromString(view.SerializeToString()) for view in (one, other)]
    for view in without:
        view.ClearField("placement")
    return without[0] == without[1]
