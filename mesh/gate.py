"""The one hook of all doors: a call comes with a key or a certificate and gets a principal, or is refused."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from expertmesh.mesh.access import OPERATOR, Rule, rule_for, rule_of
from expertmesh.mesh.api_keys import ApiKey, KeyStore, Limits, Scope
from expertmesh.mesh.audit import AuditLog
from expertmesh.mesh.config_security import ApiConfig, TlsConfig
from expertmesh.mesh.identity import Identity, certificate_identity, peer_identity, subject_of

HEADER = "authorization"
_SCHEME = "bearer"
_MAX_HEADER_CHARS = 512


class Denied(Exception):
    """A refusal, as gRPC has it; HTTP doors translate ``code`` as they do with others.

    ``retry_after_ms``: RESOURCE_EXHAUSTED by a rate limit, and when there is room again.
    """

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_ms: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_ms = retry_after_ms


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who calls.

    Args:
        who: for the audit: ``peer`` and, as far as there is one, ``key`` and ``certificate``.
        tenant: whose limits a request counts against; '' = as the request says.
        identity: of the certificate; None where certificates do not say whose they are.
    """

    who: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    limits: Limits | None = None
    identity: Identity | None = None

    def charge(self, tokens: int) -> None:
        """Tokens of the prompt or generated ones, as they become known."""
        if self.limits is not None:
            self.limits.charge(tokens)


ANYBODY = Principal()


class Gate:
    """One a door; ``open`` it for as long as the door is there.

    Args:
        server_id: who writes the audit events.
        tls: that callers come over; None or without roles: certificates say nothing.

    Raises:
        UserError: the file of keys or the audit file cannot be used.
    """

    def __init__(self, tls: TlsConfig, api: ApiConfig, server_id: str) -> None:
        self.tls = tls
        self.first_message_timeout_s = api.first_message_timeout_s
        self.audit = AuditLog(api.audit_file, server_id)
        self._keys = KeyStore(api.keys_file, time.monotonic) if api.keys_file is not None else None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Follow the file of keys; at the end close the audit file."""
        watching = asyncio.create_task(self._keys.watch(), name="api-keys") if self._keys is not None else None
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await watching
            self.close()

    def close(self) -> None:
        """Of one that has no keys and was never opened."""
        self.audit.close()

    @classmethod
    def of_roles(cls, tls: TlsConfig, api: ApiConfig, server_id: str) -> Gate:
        """Of a server that other services call alone: it knows no keys. ``close`` it at the end."""
        return cls(tls, api.model_copy(update={"keys_file": None}), server_id)

    def admit_rpc(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> tuple[Principal, Rule]:
        """
        Raises:
            Denied: UNAUTHENTICATED, PERMISSION_DENIED or RESOURCE_EXHAUSTED; it is an audit event already.
        """
        rule, who = rule_for(method), {"peer": context.peer()}
        metadata = context.invocation_metadata() or ()
        presented = [str(value) for key, value in metadata if key == HEADER]
        identity = peer_identity(context.auth_context(), self.tls)
        try:
            if identity is not None:
                who["certificate"] = _subject(context)
                _check_roles(identity, rule)
            if rule.scope is None or (identity is not None and OPERATOR in identity.roles):
                return Principal(who=who, identity=identity), rule
            return self._admit_key(presented, rule.scope, who), rule
        except Denied as denied:
            self.audit.denied(who, method, denied.code.name, denied.message)
            raise

    def refresh(self) -> None:
        """Look at the file of keys: for doors on threads, which nobody ``open``s."""
        if self._keys is not None:
            self._keys.reload()

    def admit_header(
        self,
        authorization: str | None,
        scope: Scope,
        *,
        peer: str,
        action: str,
        certificate: Mapping[str, Any] | None = None,
    ) -> Principal:
        """For doors that are not gRPC's: the same roles and scopes.

        Args:
            authorization: the value of the header; None = there is none.
            peer: the caller's address; ``action``: what it calls, such as ``POST /v1/completions``: for the audit.
            certificate: the caller's, verified, as ``ssl`` describes it; None = it showed none.

        Raises:
            Denied: as ``admit_rpc``.
        """
        who, identity = {"peer": peer}, None
        try:
            if certificate:
                who["certificate"] = subject_of(certificate)
                identity = certificate_identity(certificate, self.tls)
            elif self._keys is None and self.tls.ca_file is not None:
                raise Denied(
                    grpc.StatusCode.UNAUTHENTICATED, "there is no certificate: show one of the mesh's authority"
                )
            if identity is not None:
                _check_roles(identity, rule_of(scope))
                if OPERATOR in identity.roles:
                    return Principal(who=who, identity=identity)
            return self._admit_key([] if authorization is None else [authorization], scope, who)
        except Denied as denied:
            self.audit.denied(who, action, denied.code.name, denied.message)
            raise

    def _admit_key(self, presented: list[str], scope: Scope, who: dict[str, str]) -> Principal:
        if self._keys is None:
            return Principal(who=who)
        entry = _find(self._keys, presented)
        who["key"] = entry.id
        if scope not in entry.scopes:
            raise Denied(
                grpc.StatusCode.PERMISSION_DENIED,
                f"key {entry.id} has the scopes {', '.join(entry.scopes)}, and this needs {scope}: use another key",
            )
        limits = self._keys.limits(entry)
        name, wait_s = limits.take_request()
        if name:
            raise Denied(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"key {entry.id} is over its {name}; try again in {wait_s:.3g} s",
                retry_after_ms=math.ceil(wait_s * 1000),
            )
        return Principal(who=who, tenant=entry.id, limits=limits)


def _find(keys: KeyStore, presented: list[str]) -> ApiKey:
    # One text for all that may be wrong with a key: which of it was, is no business of who guesses.
    if not presented:
        raise Denied(
            grpc.StatusCode.UNAUTHENTICATED, f"there is no API key: send `{HEADER}: Bearer KEY` (EXPERTMESH_API_KEY)"
        )
    scheme, _, key = presented[0].partition(" ")
    if len(presented) == 1 and len(key) <= _MAX_HEADER_CHARS and scheme.lower() == _SCHEME:
        entry = keys.find(key.strip())
        if entry is not None:
            return entry
    raise Denied(
        grpc.StatusCode.UNAUTHENTICATED,
        "the API key is unknown, revoked or expired: ask the operator for another one (`expertmesh keys create`)",
    )


def _check_roles(identity: Identity, rule: Rule) -> None:
    if rule.roles is not None and not identity.roles & rule.roles:
        raise Denied(
            grpc.StatusCode.PERMISSION_DENIED,
            f"the caller's certificate is for {', '.join(sorted(identity.roles)) or 'no role'}; this is for "
            f"{', '.join(sorted(rule.roles))}: use a certificate of such a role (docs/security.md)",
        )


def _subject(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    names = context.auth_context().get("x509_subject", ())
    return ", ".join(name.decode("utf-8", errors="replace") for name in names)
