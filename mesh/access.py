"""Who may call what: for every method the scope that a key needs and the roles whose certificates may call it."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.mesh.api_keys import Scope

OPERATOR = "operator"
"""Role of certificates of people and launchers: they need no key at the admin API."""
CLIENT = "client"
"""Role of certificates of those who send requests or, with a key, ask the admin API."""
RANK_ROLES = frozenset({"attention", "expert", "both"})
SERVICE_ROLES = RANK_ROLES | {"router", "balancer"}

_PEOPLE = frozenset({OPERATOR, CLIENT})
_ADMIN_SERVICE = "expertmesh.v1.AdminService"
_READS = frozenset({"GetStatus", "GetPlacement", "ListEvents", "GetLoads", "GetCoactivation", "GetPlan", "WatchScale"})
_GENERATE_SERVICES = ("expertmesh.v1.GenerationService", "vllm.grpc.engine.VllmEngine")
_OPEN_SERVICES = ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """``scope``: None = no key is asked for. ``roles``: None = every certificate of the authority."""

    scope: Scope | None
    roles: frozenset[str] | None
    writes: bool = False
    """It changes the mesh: what comes of it is an audit event."""


_OPEN = Rule(scope=None, roles=None)
_GENERATE = Rule(scope="generate", roles=_PEOPLE)
_READ = Rule(scope="read", roles=_PEOPLE)
# What nobody thought of is the administrator's.
_ADMIN = Rule(scope="admin", roles=_PEOPLE, writes=True)
_BY_SERVICE = {
    "expertmesh.v1.MembershipService": Rule(scope=None, roles=RANK_ROLES | {"router"}),
    "expertmesh.v1.AttentionService": Rule(scope=None, roles=frozenset({"router"})),
    **dict.fromkeys(_GENERATE_SERVICES, _GENERATE),
    **dict.fromkeys(_OPEN_SERVICES, _OPEN),
}


def rule_for(method: str) -> Rule:
    """Of a gRPC method, ``/package.Service/Method``."""
    service, _, name = method.removeprefix("/").rpartition("/")
    if service == _ADMIN_SERVICE and name in _READS:
        return _READ
    return _BY_SERVICE.get(service, _ADMIN)


def rule_of(scope: Scope) -> Rule:
    """Of what asks for this scope, at doors that are not gRPC's."""
    return {"generate": _GENERATE, "read": _READ, "admin": _ADMIN}[scope]
