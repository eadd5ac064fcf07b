"""How commands connect: with the TLS of ``mesh.yaml``, as an operator or as a client."""

from __future__ import annotations

from expertmesh.mesh.access import CLIENT, OPERATOR
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.mesh.errors import UserError


def admin_tls(config: MeshConfig) -> TlsConfig:
    """To a balancer."""
    return config.tls.for_service(OPERATOR, OPERATOR)


def door_tls(config: MeshConfig, role: str = CLIENT) -> TlsConfig:
    """To the router's door: as ``role`` where it asks for certificates.

    Raises:
        UserError: the door has a certificate of its own, and nothing says whose authority it is of.
    """
    if config.api.cert_file is None and config.api.ca_file is None:
        return config.tls.for_service(role, role)
    if config.api.ca_file is None:
        raise UserError(
            "api.ca_file",
            "is unset though api.cert_file is set",
            "name the authority of that certificate, such as /etc/ssl/certs/ca-certificates.crt",
        )
    return TlsConfig(ca_file=config.api.ca_file)
