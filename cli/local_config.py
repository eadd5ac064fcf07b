"""The mesh.yaml that the services of a local mesh read: as configured, with the addresses that are known by now."""

from __future__ import annotations

from pathlib import Path

import yaml

from expertmesh.cli.process import ServiceProcess
from expertmesh.cli.state_dir import write_atomically
from expertmesh.mesh.config import MeshConfig


class LocalConfig:
    """Written anew whenever an address is learnt: services that start later find the balancers, and a router or a
    balancer that starts again is found where it was.
    """

    def __init__(self, config: MeshConfig, state_dir: Path) -> None:
        self.file = state_dir / "mesh.yaml"
        self.current = config
        self._balancers: dict[str, str] = {}  # id → address

    def write(self) -> None:
        data = self.current.model_dump(mode="json", exclude_none=True)
        write_atomically(self.file, yaml.safe_dump(data, sort_keys=False))

    def learn(self, server: ServiceProcess) -> None:
        """Where a service listens that has just said so; others than routers and balancers are not looked for."""
        assert server.address is not None, "it is ready"
        if server.role == "balancer":
            self._balancers[server.id] = server.address
            self._set_balancers()
        elif server.role == "router":
            self.set_router(server.address, server.http_address)
        else:
            return
        self.write()

    def set_router(self, address: str, http_address: str | None) -> None:
        """Routers listen there, also when they start again."""
        update: dict[str, object] = {"port": _port_of(address)}
        if http_address is not None:
            update["http"] = self.current.router.http.model_copy(update={"port": _port_of(http_address)})
        self.current = self.current.model_copy(update={"router": self.current.router.model_copy(update=update)})

    def balancer_port(self, server_id: str) -> int | None:
        """Where that balancer listened before; None = it was not there yet, or is none."""
        return _port_of(self._balancers[server_id]) if server_id in self._balancers else None

    def _set_balancers(self) -> None:
        balancer, addresses = self.current.balancer, self._balancers
        update: dict[str, object] = {"address": ",".join(addresses[name] for name in sorted(addresses))}
        if balancer.servers == 1:  # each of several is told its own
            update["port"] = _port_of(*addresses.values())
        self.current = self.current.model_copy(update={"balancer": balancer.model_copy(update=update)})


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
