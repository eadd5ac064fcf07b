"""How commands connect: with the TLS of ``mesh.yaml``, as an operator or as a client."""

from __future__ import annotations

from expertmesh.mesh.access import CLIENT, OPERATOR
from expertmesh.mesh.addresses import split_host_port
from expertmesh.mesh.client_key import VARIABLE, key_from_environment
from expertmesh.mesh.config import ApiConfig, MeshConfig, TlsConfig
from expertmesh.mesh.config_security import is_loopback
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


def key_for(address: str, tls: TlsConfig, api: ApiConfig) -> str | None:
    """The key of the environment, for a server that a command connects to with ``tls``; None = there is none.

    Raises:
        UserError: it cannot be read, or would cross a network in the clear.
    """
    key = key_from_environment()
    host, _ = split_host_port(address)
    in_the_clear = tls.ca_file is None and tls.cert_file is None and not api.allow_plaintext
    if key is not None and in_the_clear and not is_loopback(host):
        raise UserError(
            VARIABLE,
            f"would travel to {address} without TLS",
            "give --config with the mesh's tls or api.ca_file (or with api.allow_plaintext), or unset it",
        )
    return key
