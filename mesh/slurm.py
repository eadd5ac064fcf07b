"""What Slurm tells a process about its place in a job, from the variables that slurmd and srun set.

A mesh is one heterogeneous job: component 0 has the balancer and the routers, each further one the ranks of a role, or
of several roles that share its nodes. The tasks of a component are one step. A server that comes later has a job of its
own.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.mesh.errors import UserError

CONTROL = "control"
"""Instead of a role, for component 0: the task on the batch script's node is the balancer, all others are routers."""

RANK_ROLES = ("attention", "expert", "both")


def turns(asked: str) -> list[str]:
    """The roles that the tasks of a component take in turn: of ``attention+expert+expert`` every third task, from the
    first one, is an attention server.

    Raises:
        UserError: one is no role of a rank.
    """
    roles = asked.split("+")
    for role in roles:
        if role not in RANK_ROLES:
            raise UserError("ROLE", f"{role!r} in {asked!r} is none", f"give {', '.join(RANK_ROLES)}, joined with +")
    return roles


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One task of a job step.

    Args:
        job_id: of the job, for a heterogeneous one of its first component.
        index: among the tasks of its step, from 0.
        local_index: among those on its node, from 0.
        node: its name in Slurm.
    """

    job_id: int
    index: int
    local_index: int
    node: str

    def role(self, asked: str) -> str:
        """What this task serves, where its step was asked for ``CONTROL`` or for ``turns`` of roles."""
        if asked != CONTROL:
            roles = turns(asked)
            return roles[self.index % len(roles)]
        return "balancer" if self.index == 0 else "router"

    def server_id(self, asked: str, *, joins: bool) -> str:
        """``expert-3``; of a server with a job of its own ``expert-j1234-0``, which no other one ever has.

        A server that is started again, also with the whole job, keeps its name.
        """
        if asked == CONTROL:
            return "balancer" if self.index == 0 else f"router-{self.index - 1}"
        role = self.role(asked)
        number = servers_of(role, asked, self.index)  # those before this one
        return joined_id(role, self.job_id, number) if joins else f"{role}-{number}"


def servers_of(role: str, asked: str, num_tasks: int) -> int:
    """How many of the first ``num_tasks`` tasks of a component take the role."""
    roles = turns(asked)
    return sum(roles[index % len(roles)] == role for index in range(num_tasks))


def joined_id(role: str, job_id: int, index: int = 0) -> str:
    """Of a server with a job of its own."""
    return f"{role}-j{job_id}-{index}"


def task_from(environ: Mapping[str, str]) -> Task:
    """This process's task.

    Raises:
        UserError: it was not started by srun.
    """
    return Task(
        job_id=_number(environ, "SLURM_JOB_ID"),
        index=_number(environ, "SLURM_PROCID"),
        local_index=_number(environ, "SLURM_LOCALID"),
        node=_text(environ, "SLURMD_NODENAME"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A heterogeneous job as its batch script sees it.

    Args:
        num_tasks: by component.
        cpus_per_task: likewise; None where the component does not say.
    """

    job_id: int
    node: str
    num_tasks: tuple[int, ...]
    cpus_per_task: tuple[int | None, ...]


def job_from(environ: Mapping[str, str]) -> Job:
    """
    Raises:
        UserError: this is not the batch script of a heterogeneous job.
    """
    if "SLURM_HET_SIZE" not in environ:
        raise UserError(
            "SLURM_HET_SIZE",
            "is not set: this is no heterogeneous job",
            "submit one like deploy/slurm/mesh.sbatch",
        )
    components = range(_number(environ, "SLURM_HET_SIZE"))
    return Job(
        job_id=_number(environ, "SLURM_JOB_ID"),
        node=_text(environ, "SLURMD_NODENAME"),
        num_tasks=tuple(_number(environ, f"SLURM_NTASKS_HET_GROUP_{component}") for component in components),
        cpus_per_task=tuple(
            _number(environ, name) if (name := f"SLURM_CPUS_PER_TASK_HET_GROUP_{component}") in environ else None
            for component in components
        ),
    )


def address_towards(host: str) -> str:
    """This machine's address on the way to ``host``: what others reach it by. Nothing is sent.

    Raises:
        UserError: there is no way to ``host``.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            "balancer.address", f"no way leads to {host} ({error})", "name a host of this cluster"
        ) from None


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise UserError(name, "is not set", "start this with srun, in a job of Slurm (deploy/slurm)")
    return value


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name)
    if not (value.isascii() and value.isdigit()):
        raise UserError(name, f"is {value!r}, not a number", "leave Slurm's variables as it sets them")
    return int(value)
