"""Which servers a local mesh has: those that were planned, and those that the scale or somebody asked for since."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from expertmesh.cli.local_plan import planned_services
from expertmesh.cli.process import ServiceProcess
from expertmesh.mesh.config import MeshConfig
from expertmesh.v1 import admin_pb2, mesh_pb2

SCALED_ROLES = ("attention", "both", "expert")


class Roster:
    """
    Args:
        make: a process of a role and an id, not started.
        changed: guards what changes, and hears of it.
        is_planned: the configuration says how many servers there are; else a balancer does that remembers it.
    """

    def __init__(
        self,
        config: MeshConfig,
        make: Callable[[str, str], ServiceProcess],
        changed: threading.Condition,
        *,
        is_planned: bool,
    ) -> None:
        planned = list(planned_services(config))
        self._make = make
        self._changed = changed
        self.servers = {server_id: make(role, server_id) for role, server_id in planned}
        """By id; replaced, never changed: others may look at it."""
        self.planned = frozenset(self.servers)
        """Ids of those that make the mesh whole."""
        self.is_planned = is_planned
        """Whether it is known how many servers start."""
        self._num_named = Counter(role for role, _ in planned)  # ids are not used twice
        self._targets = {role: self._num_named[role] for role in SCALED_ROLES}  # of the scale, as far as it is seen to

    def one_more(self, role: str) -> ServiceProcess:
        """Under an id that this mesh never had; not started."""
        with self._changed:
            server_id = f"{role}-{self._num_named[role]}"
            self._num_named[role] += 1
            server = self._make(role, server_id)
            self.servers = {**self.servers, server_id: server}
        return server

    def see_to(self, scale: admin_pb2.Scale) -> None:
        """Start what the scale asks for beyond what it asked for before. What there is too much of leaves by itself:
        the balancer drains it, and it is not started again."""
        targets = dict.fromkeys(SCALED_ROLES, 0)
        targets |= {mesh_pb2.Role.Name(entry.role).removeprefix("ROLE_").lower(): entry.target for entry in scale.roles}
        if not self.is_planned:
            self._plan(targets)
            return
        for role in SCALED_ROLES:
            for _ in range(targets[role] - self._targets[role]):
                self.one_more(role).start()
        self._targets = targets

    def _plan(self, targets: dict[str, int]) -> None:
        """Nothing was started yet: start so many, whatever the configuration says."""
        wanted = {f"{role}-{index}": role for role in SCALED_ROLES for index in range(targets[role])}
        kept = {
            name: server for name, server in self.servers.items() if name in wanted or server.role not in SCALED_ROLES
        }
        new = {name: self._make(role, name) for name, role in wanted.items() if name not in kept}
        with self._changed:
            self.servers = {**kept, **new}
            self.planned = frozenset(self.servers)
            self._num_named |= Counter(targets)
            self._targets, self.is_planned = targets, True
            self._changed.notify_all()

    def drop(self, server_id: str) -> ServiceProcess:
        """One that has left for good."""
        with self._changed:
            server = self.servers[server_id]
            assert server.pid is None, f"{server_id} still runs"
            self.servers = {name: other for name, other in self.servers.items() if other is not server}
        return server
