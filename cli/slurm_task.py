"""``expertmesh slurm task``: keeps one server of the mesh running in one task of a Slurm job."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import yaml

from expertmesh.cli import slurm_commands as slurm
from expertmesh.cli.local_plan import environment
from expertmesh.cli.next_ports import with_free_ports, with_next_ports
from expertmesh.cli.process import ProcessEvent, ServiceProcess
from expertmesh.cli.rolling_log import LogSize
from expertmesh.cli.signals import SignalWatch
from expertmesh.cli.slurm_balancer import Balancer
from expertmesh.cli.state_dir import write_atomically
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.slurm import Task, address_towards
from expertmesh.v1 import mesh_pb2

log = logging.getLogger(__name__)

STAGE_TIMEOUT_S = 8.0
"""For the servers of one stage to leave, and for this one to stop: what a draining server needs at most, as for a local
mesh. Three stages before the balancer fit into Slurm's usual KillWait of 30 s."""

_POLL_S = 0.2
_LOOK_S = 15.0

_BEFORE = {
    "router": (),
    "attention": ("router",),
    "both": ("router",),
    "expert": ("router", "attention"),
    "balancer": ("router", "attention", "both", "expert"),
}
"""Who has to have left before a role stops: Slurm asks all tasks of a job to end at the same moment, and what a router
still streams needs every rank."""


class TaskSupervisor:
    """Starts one server, starts it again when it dies, and stops it in its turn when Slurm asks the task to end.

    Args:
        asked: ``control``, or roles that the tasks of the step take in turn.
        run_dir: has the job's mesh.yaml, and takes the logs.
        joins: the server has a job of its own, and stops at once when that is asked to.
    """

    def __init__(
        self, config: MeshConfig, task: Task, asked: str, *, run_dir: Path, joins: bool, log_size: LogSize
    ) -> None:
        self._balancer = Balancer(config)
        self._role = task.role(asked)
        self._joins = joins
        self._exit_code = 0
        self._woken = threading.Event()  # by a signal, or by the end of the server
        self._over = False
        server_id = task.server_id(asked, joins=joins)
        host = address_towards(self._balancer.addresses[0].rpartition(":")[0].strip("[]"))
        file = run_dir / "servers" / f"{server_id}.yaml"
        serve = ["serve", self._role, "--id", server_id, "--config", str(file), "--host", host]
        serve += ["--node", task.node, "--stop-with-stdin", "--ignore-sigterm"]
        for folder in ("logs", "servers"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        own = with_free_ports(config) if joins else with_next_ports(config, task.local_index)
        write_atomically(file, yaml.safe_dump(own.model_dump(mode="json", exclude_none=True), sort_keys=False))
        self._server = ServiceProcess(
            role=self._role,
            server_id=server_id,
            command=lambda: [sys.executable, "-P", "-m", "expertmesh.cli.main", *serve],
            environment=environment(config, self._role),
            log_file=run_dir / "logs" / f"{server_id}.log",
            on_event=self._on_event,
            log_size=log_size,
            stop_signal=signal.SIGINT,
        )

    def run(self) -> int:
        """Until the server has left for good, was given up, or was stopped; the exit status for the task."""
        if self._joins and not asyncio.run(self._is_missed()):
            log.info("there are as many %s servers as there should be: not started", self._role)
            return 0
        with SignalWatch(self._on_signal):
            self._server.start()
            while not self._woken.wait(_LOOK_S) and not asyncio.run(self._look()):
                pass
            if not self._over:
                asyncio.run(self._wait_for_turn())
                self._server.begin_stop()
            self._server.finish_stop(STAGE_TIMEOUT_S)
        return self._exit_code

    def _on_signal(self, number: signal.Signals) -> None:
        log.info("%s: %s stops in its turn", number.name, self._server.id)
        self._server.stop_restarting()  # one that dies from now on may stay dead
        self._woken.set()

    def _on_event(self, event: ProcessEvent) -> None:
        level = logging.WARNING if event.kind in ("restarting", "failed") else logging.INFO
        log.log(level, "%s: %s", event.server_id, event.text)
        if event.kind == "ready":
            self._server.established = True  # its configuration works
        elif event.kind in ("left", "failed"):
            self._exit_code = event.exit_code if event.exit_code >= 0 else 128 - event.exit_code
            self._over = True
            self._woken.set()
        elif event.kind == "stopped":
            self._woken.set()

    async def _look(self) -> bool:
        """See to what nobody else is left to do; whether this server should stop."""
        job, node = os.environ.get("EXPERTMESH_SLURM_JOB"), os.environ.get("EXPERTMESH_BALANCER_NODE")
        if job is None or node is None:
            return False
        try:
            if self._joins:  # the job that it joined may have ended in a way that let it cancel nothing
                return await slurm.is_over(int(job))
            if self._role == "router" and await self._balancer.status() is None and await slurm.is_down(node):
                # Slurm lets the job go on without its batch script, and the mesh without a balancer.
                log.warning("%s, the node of the balancer, is down: the job is requeued", node)
                await slurm.requeue(int(job))
        except slurm.SlurmError as error:
            log.warning("%s", error)
        return False

    async def _is_missed(self) -> bool:
        """Whether there are fewer servers of the role than there should be; so when nobody can be asked."""
        status = await self._balancer.status()
        if status is None:
            return True
        role = mesh_pb2.Role.Value(f"ROLE_{self._role.upper()}")
        return any(entry.servers < entry.target for entry in status.scale.roles if entry.role == role)

    async def _wait_for_turn(self) -> None:
        """Until those have left that go before, at most ``STAGE_TIMEOUT_S`` for each of their stages."""
        before = () if self._joins else _BEFORE[self._role]
        roles = {mesh_pb2.Role.Value(f"ROLE_{role.upper()}") for role in before}
        try:
            async with asyncio.timeout(STAGE_TIMEOUT_S * min(len(before), 3)):
                while roles:
                    status = await self._balancer.status()
                    lost = mesh_pb2.SERVER_STATE_LOST
                    if status is None or not any(s.role in roles and s.state != lost for s in status.servers):
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            log.warning("%s stops although others have not left", self._server.id)
