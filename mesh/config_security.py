"""``tls`` and ``api``: who may speak to whom. What they protect, and what not, is in docs/security.md."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator

from expertmesh.mesh.config_section import Section
from expertmesh.mesh.errors import UserError

ETCD_PASSWORD_VARIABLE = "EXPERTMESH_ETCD_PASSWORD"  # noqa: S105 - the name of one


class TlsConfig(Section):
    """Between the services of a mesh. With ``ca_file`` each side shows a certificate of that authority."""

    cert_file: Path | None = Field(
        None, description="`{role}` and `{id}` in the path become those of the service: `tls/{id}.pem`"
    )
    key_file: Path | None = Field(None, description="of cert_file; `{role}` and `{id}` as there")
    ca_file: Path | None = Field(None, description="with it, clients must present a certificate of this authority")
    check_roles: bool = Field(
        True,
        description="with ca_file: a certificate speaks for the roles that its DNS names give, ROLE.DOMAIN, and where "
        "there is an ID.ROLE.DOMAIN for that server alone; false = every certificate of the authority may do all",
    )
    domain: str = Field(
        "mesh.expertmesh",
        pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$",
        description="DOMAIN of those names; meshes that share an authority take different ones",
    )

    @model_validator(mode="after")
    def _whole(self) -> TlsConfig:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together: set both or neither")
        return self

    @property
    def with_roles(self) -> bool:
        """Whether certificates say who is who."""
        return self.check_roles and self.ca_file is not None and self.cert_file is not None

    def name_of(self, role: str) -> str:
        """The DNS name that a certificate of the role carries."""
        return f"{role}.{self.domain}"

    def for_service(self, role: str, server_id: str) -> TlsConfig:
        """With the paths of this service's own files."""

        def own(path: Path | None) -> Path | None:
            return path and Path(str(path).replace("{role}", role).replace("{id}", server_id))

        return self.model_copy(update={"cert_file": own(self.cert_file), "key_file": own(self.key_file)})


class ApiConfig(Section):
    """At the doors: the router's gRPC and HTTP APIs, the balancer's admin API."""

    keys_file: Path | None = Field(
        None, description="hashed API keys, written by `expertmesh keys`; unset = nobody is asked for a key"
    )
    cert_file: Path | None = Field(
        None, description="certificate of the router's doors, whose clients then need none; unset = that of `tls`"
    )
    key_file: Path | None = Field(None, description="of cert_file")
    ca_file: Path | None = Field(
        None, description="for clients: the authority of cert_file, such as /etc/ssl/certs/ca-certificates.crt"
    )
    allow_plaintext: bool = Field(
        False, description="take keys without TLS on other interfaces than loopback: something before us ends TLS"
    )
    audit_file: Path | None = Field(
        None, description="JSON lines of admin writes and refused calls; unset = to the log, as `expertmesh.audit`"
    )
    first_message_timeout_s: float = Field(
        10.0, gt=0, description="a call whose first message is not there by then ends with DEADLINE_EXCEEDED"
    )

    @model_validator(mode="after")
    def _whole(self) -> ApiConfig:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together: set both or neither")
        return self

    def check_door(self, key: str, host: str, *, has_tls: bool) -> None:
        """
        Raises:
            UserError: keys would cross a network in the clear.
        """
        if self.keys_file is None or has_tls or self.allow_plaintext or is_loopback(host):
            return
        raise UserError(
            key,
            f"is {host}, and API keys (api.keys_file) would travel without TLS",
            "set tls.cert_file (or, for the router, api.cert_file), or api.allow_plaintext where TLS ends before us",
        )


def is_loopback(host: str) -> bool:
    """Whether what listens there can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
