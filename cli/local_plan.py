"""What a local mesh consists of, from its configuration alone."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from expertmesh.mesh import client_key
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.config_security import ETCD_PASSWORD_VARIABLE
from expertmesh.mesh.errors import UserError


def check_ports(config: MeshConfig) -> None:
    """
    Raises:
        UserError: several processes of one machine would have the same port.
    """
    if config.balancer.servers > 1 and config.balancer.port:
        raise UserError(
            "balancer.port",
            f"the {config.balancer.servers} balancers of a local mesh cannot share port {config.balancer.port}",
            "set it to 0: each picks a port, and all others are told",
        )
    if config.telemetry.metrics_port:
        raise UserError(
            "telemetry.metrics_port",
            f"the processes of a local mesh cannot share port {config.telemetry.metrics_port}",
            "set it to 0: each process picks a port and logs it",
        )


def planned_services(config: MeshConfig) -> Iterable[tuple[str, str]]:
    """(role, id) of every process of a local mesh, the balancers first."""
    yield "balancer", "balancer"
    for index in range(1, config.balancer.servers):
        yield "balancer", f"balancer-{index}"
    counts = {"router": config.router.servers}
    counts |= {"attention": config.attention.servers, "expert": config.expert.servers, "both": config.both_servers}
    for role, count in counts.items():
        for index in range(count):
            yield role, f"{role}-{index}"


def has_past(config: MeshConfig) -> bool:
    """Whether its balancer may have the state of an earlier start."""
    return config.balancer.state_dir is not None or config.balancer.state == "etcd"


def with_balancer_state(config: MeshConfig, state_dir: Path) -> MeshConfig:
    if config.balancer.state_dir is not None:
        return config
    # Every start of a local mesh is a new mesh: what an earlier one knew about its processes is void.
    state = state_dir / "balancer"
    shutil.rmtree(state, ignore_errors=True)
    return parse_config(
        {**config.model_dump(), "balancer": {**config.balancer.model_dump(), "state_dir": state}}, "the configuration"
    )


def environment(config: MeshConfig, role: str) -> dict[str, str]:
    threads = config.expert.num_threads if role == "expert" else config.attention.num_threads
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    # No secret goes where it is not needed: who may read a process's environment is not up to us.
    withheld = {client_key.VARIABLE} if role == "balancer" else {client_key.VARIABLE, ETCD_PASSWORD_VARIABLE}
    inherited = {name: value for name, value in os.environ.items() if name not in withheld}
    return {**inherited, **limits, "PYTHONSAFEPATH": "1"}


class GpuNumbers:
    """Which GPU of the machine a rank computes on, should it compute on one. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}

    def of(self, server_id: str, servers: Collection[str]) -> int:
        """The lowest that none of ``servers`` has; a rank that starts again has its own."""
        with self._lock:
            if server_id not in self._numbers:
                self._numbers = {name: number for name, number in self._numbers.items() if name in servers}
                taken = set(self._numbers.values())
                self._numbers[server_id] = next(number for number in range(len(taken) + 1) if number not in taken)
            return self._numbers[server_id]
