"""Who a certificate speaks for, and whether a registration is by whom it says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.mesh.config_security import TlsConfig

_GUEST_OF = "@"


def guest_id(server_id: str, mesh: str) -> str:
    """The name of a router in another mesh than its own, which may have one of its name; its certificate speaks for it
    there too."""
    return f"{server_id}{_GUEST_OF}{mesh}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """``ids``: role → the servers that it is for; a role without an entry there is for all of that role."""

    roles: frozenset[str]
    ids: Mapping[str, frozenset[str]]

    def why_not(self, role: str, server_id: str) -> str:
        """Why this certificate cannot be that server's; '' when it can."""
        if role not in self.roles:
            return f"its certificate is for {', '.join(sorted(self.roles)) or 'no role'}, not for {role}"
        allowed = self.ids.get(role)
        # A router is a guest in the mesh that computes its prompts; other servers are in one mesh only.
        own_id = server_id.partition(_GUEST_OF)[0] if role == "router" else server_id
        if allowed is not None and own_id not in allowed:
            return f"its certificate is for {', '.join(sorted(allowed))}, not for {server_id}"
        return ""


def identity_of(dns_names: Iterable[str], tls: TlsConfig) -> Identity:
    """From the DNS names of a verified certificate: ``ROLE.DOMAIN`` and ``ID.ROLE.DOMAIN``."""
    suffix = f".{tls.domain}"
    roles: set[str] = set()
    ids: dict[str, set[str]] = {}
    for name in dns_names:
        if not name.endswith(suffix):
            continue
        server_id, _, role = name.removesuffix(suffix).rpartition(".")
        roles.add(role)
        if server_id:
            ids.setdefault(role, set()).add(server_id)
    return Identity(roles=frozenset(roles), ids={role: frozenset(names) for role, names in ids.items()})


def peer_identity(auth_context: Mapping[str, Iterable[bytes]], tls: TlsConfig) -> Identity | None:
    """Of the caller's verified certificate; None where certificates say nothing about roles.

    Args:
        auth_context: as gRPC has it; ``peer_dns`` holds the DNS names alone, whatever else the certificate names.
    """
    if not tls.with_roles:
        return None
    names = (name.decode("ascii", errors="replace") for name in auth_context.get("peer_dns", ()))
    return identity_of(names, tls)


def certificate_identity(certificate: Mapping[str, Any], tls: TlsConfig) -> Identity | None:
    """Of a verified certificate as ``ssl`` describes it; None where certificates say nothing about roles."""
    if not tls.with_roles:
        return None
    return identity_of((name for kind, name in certificate.get("subjectAltName", ()) if kind == "DNS"), tls)


def subject_of(certificate: Mapping[str, Any]) -> str:
    """``CN=operator``, for people."""
    short = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU"}
    parts = (part for names in certificate.get("subject", ()) for part in names)
    return ",".join(f"{short.get(kind, kind)}={value}" for kind, value in parts)
