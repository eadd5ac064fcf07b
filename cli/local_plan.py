"""What a local mesh consists of, from its configuration alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from expertmesh.mesh import client_key
from expertmesh.mesh.config import MeshConfig, parse_config
from expertmesh.mesh.config_security import ETCD_PASSWORD_VARIABLE


def planned_services(config: MeshConfig) -> Iterable[tuple[str, str]]:
    """(role, id) of every process of a local mesh, the balancers first."""
    yield "balancer", "balancer"
    for index in range(1, config.balancer.servers):
        yield "balancer", f"balancer-{index}"
    yield "router", "router-0"
    counts = {"attention": config.attention.servers, "expert": config.expert.servers, "both": config.both_servers}
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
