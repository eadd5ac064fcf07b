"""Servers that share a machine and a mesh.yaml: each has ports of its own."""

from __future__ import annotations

from expertmesh.cli.up import with_overrides
from expertmesh.mesh.config import MeshConfig

_PORTS = (
    "router.port",
    "router.http.port",
    "attention.port",
    "expert.port",
    "dataplane.port",
    "disaggregation.port",
    "telemetry.metrics_port",
)


def with_next_ports(config: MeshConfig, index: int) -> MeshConfig:
    """For the server with this number on its machine: ports that are set are those of the first one.

    Raises:
        UserError: there are not so many ports.
    """
    return with_overrides(config, {key: port + index for key, port in _set_ports(config).items()})


def with_free_ports(config: MeshConfig) -> MeshConfig:
    """For a server that comes to a machine of which nobody knows what runs there: any free ports."""
    return with_overrides(config, dict.fromkeys(_set_ports(config), 0))


def _set_ports(config: MeshConfig) -> dict[str, int]:
    found = {}
    for key in _PORTS:
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        if isinstance(value, int) and value:
            found[key] = value
    return found
