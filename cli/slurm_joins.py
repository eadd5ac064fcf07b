"""Servers that a Slurm job lacks get jobs of their own: when the scale is raised, and when a node is lost for good."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from expertmesh.cli import slurm_commands as slurm
from expertmesh.cli.slurm_balancer import Balancer
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.slurm import joined_id
from expertmesh.v1 import admin_pb2, mesh_pb2

log = logging.getLogger(__name__)

LOOK_S = 1.0
START_HOLD_S = 600.0
_LONGEST_HOLD_S = 3600.0


@dataclass(kw_only=True)
class Gap:
    """Decides when the servers that a role lacks are asked for.

    A rank that died is started again where it was, which takes its start's time; so a gap has to last ``hold_s`` first,
    and after every job that did not close it twice as long as before. The first gap is the mesh's start, in which
    servers read their weights: it has to last ``start_s``.
    """

    hold_s: float
    start_s: float = START_HOLD_S
    _started: bool = field(default=False, init=False)
    _since_s: float | None = field(default=None, init=False)
    _asked: int = field(default=0, init=False)

    def to_ask_for(self, missing: int, now_s: float) -> int:
        """How many servers to ask for now.

        Args:
            missing: servers that there should be, less those that are there or were asked for and are still awaited.
        """
        if missing <= 0:
            self._since_s = None
            return 0
        if self._since_s is None:
            self._since_s = now_s
        hold_s = self.hold_s if self._started else max(self.start_s, self.hold_s)
        if now_s - self._since_s < min(hold_s * 2**self._asked, _LONGEST_HOLD_S):
            return 0
        self._since_s = None
        self._asked += 1
        return missing

    def mesh_began(self) -> None:
        """It has had a view: what is missing from now on was there, or is late."""
        self._started = True

    def is_closed(self) -> bool:
        """All servers are there, and the next gap is another one; whether somebody was asked for in this one."""
        asked, self._asked, self._since_s, self._started = self._asked, 0, None, True
        return asked > 0


class Joins:
    """Watches the scale of the mesh of one job, and submits a job for each server that is missing.

    Args:
        names: of the roles' jobs in Slurm, by role; they are how the jobs are found again.
        script: submitted with the role as its argument.
    """

    def __init__(
        self, config: MeshConfig, *, names: Mapping[str, str], script: Path, logs: Path, hold_s: float, launcher: str
    ) -> None:
        self._balancer = Balancer(config)
        self._names = names
        self._script = script
        self._logs = logs
        self._launcher = launcher
        self._gaps = {role: Gap(hold_s=hold_s) for role in names}

    async def run(self) -> None:
        """Until cancelled; a balancer or a slurmctld that does not answer is asked again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_for_ever(self._watch), name="slurm-watch")
            group.create_task(_for_ever(self._look), name="slurm-look")

    async def cancel(self) -> None:
        """Cancel every job that was submitted here, also by an earlier start of this job."""
        for name in self._names.values():
            try:
                await slurm.cancel_named(name)
            except slurm.SlurmError as error:
                log.warning("%s", error)

    async def _watch(self) -> None:
        """Be known to the balancer as somebody who starts servers."""
        async with self._balancer.admin() as stub:
            async for response in stub.WatchScale(admin_pb2.WatchScaleRequest(launcher=self._launcher)):
                log.info("the scale has version %d", response.scale.version)

    async def _look(self) -> None:
        status = await self._balancer.status()
        if status is None:
            return
        there = {server.server_id for server in status.servers if server.state != mesh_pb2.SERVER_STATE_LOST}
        for entry in status.scale.roles:
            role = mesh_pb2.Role.Name(entry.role).removeprefix("ROLE_").lower()
            if role in self._names:
                if status.view_number:
                    self._gaps[role].mesh_began()
                await self._see_to(role, entry, there)

    async def _see_to(self, role: str, entry: admin_pb2.RoleScale, there: Collection[str]) -> None:
        if entry.servers >= entry.target:
            if self._gaps[role].is_closed():
                await slurm.cancel_named(self._names[role], waiting_only=True)  # what it was to replace came back
            return
        jobs = await slurm.jobs_named(self._names[role])
        awaited = sum(joined_id(role, job) not in there for job in jobs)
        missing = entry.target - entry.servers - awaited
        for _ in range(self._gaps[role].to_ask_for(missing, time.monotonic())):
            log_file = self._logs / f"{role}-j%j.out"
            job = await slurm.submit(self._script, [role], name=self._names[role], log=log_file)
            log.info("%s servers: %d of %d are there; job %d brings one", role, entry.servers, entry.target, job)


async def _for_ever(act: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await act()
        except grpc.aio.AioRpcError as error:
            log.debug("the balancer answers %s", error.code().name)  # it starts, or is started again
        except slurm.SlurmError as error:
            log.warning("%s", error)
        await asyncio.sleep(LOOK_S)
