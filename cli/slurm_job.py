"""``expertmesh slurm job``: what a mesh's batch script runs: a step for each component, and what they share."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertmesh.cli import slurm_commands as slurm
from expertmesh.cli.slurm_joins import Joins
from expertmesh.cli.state_dir import write_atomically
from expertmesh.cli.up import with_overrides
from expertmesh.mesh.config import MeshConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.rpc import join_host_port
from expertmesh.mesh.slurm import CONTROL, Job, servers_of, turns

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 40.0
"""For the steps of a job that ends: their servers stop one group after the other."""

_COUNTS = {"attention": "attention.servers", "expert": "expert.servers", "both": "both_servers"}


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """
    Args:
        roles: of components 1, 2 ...; ``attention+expert`` where the tasks of one take them in turn.
        join_script: for servers that come later; None = nobody brings them.
        replace_after_s: how long a server may be away before another one is asked for.
    """

    roles: Sequence[str]
    run_dir: Path
    join_script: Path | None
    replace_after_s: float


def job_config(config: MeshConfig, job: Job, options: JobOptions, host: str, balancer_port: int) -> MeshConfig:
    """The configuration that all servers of the job read: with as many servers as there are tasks.

    Args:
        host: address of the node that the balancer runs on.
        balancer_port: where it listens there.

    Raises:
        UserError: components and roles do not fit.
    """
    if len(options.roles) != len(job.num_tasks) - 1:
        raise UserError(
            "ROLE", f"{len(options.roles)} for {len(job.num_tasks) - 1} components after the first", "give one for each"
        )
    named = [role for asked in options.roles for role in sorted(set(turns(asked)))]
    if len(set(named)) < len(named):
        raise UserError(
            "ROLE",
            f"{' '.join(options.roles)} names one in two components",
            "one component for a role, with more tasks",
        )
    if job.num_tasks[0] < 2:
        raise UserError("--ntasks", f"{job.num_tasks[0]} in component 0", "2 or more: the balancer and its routers")
    components = list(zip(options.roles, job.num_tasks[1:], strict=True))
    overrides: dict[str, Any] = {
        key: sum(servers_of(role, asked, num_tasks) for asked, num_tasks in components) for role, key in _COUNTS.items()
    }
    overrides["balancer.port"] = balancer_port
    overrides["balancer.address"] = join_host_port(host, balancer_port)
    if config.balancer.state == "file" and config.balancer.state_dir is None:
        overrides["balancer.state_dir"] = options.run_dir / "balancer"  # a job that is requeued finds it again
    return with_overrides(config, overrides)


class SlurmJob:
    """One run of the batch script; a requeued job makes another one in the same folder."""

    def __init__(self, config: MeshConfig, job: Job, options: JobOptions) -> None:
        self._config = config
        self._job = job
        self._options = options
        self._stop = asyncio.Event()
        self._requeue = False
        names = {role: f"{config.name}-{job.job_id}-{role}" for asked in options.roles for role in turns(asked)}
        self._joins = Joins(
            config,
            names=names,
            script=options.join_script or Path(),
            logs=options.run_dir / "logs",
            hold_s=options.replace_after_s,
            launcher=f"slurm job {job.job_id}",
        )

    async def run(self) -> int:
        """Until the job is asked to end or its control component ends; the job's exit status."""
        self._catch_signals()
        self._write_files()
        await self._joins.cancel()  # of a start before this one: they know another balancer
        steps = [await self._start_step(number) for number in range(len(self._job.num_tasks))]
        tasks = [asyncio.create_task(self._see_end(number, step)) for number, step in enumerate(steps)]
        joining = asyncio.create_task(self._bring_servers(), name="joins")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        try:
            await asyncio.wait((tasks[0], joining, stopping), return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                joining.result()
        finally:
            for task in (joining, stopping):
                task.cancel()
            await asyncio.gather(joining, stopping, return_exceptions=True)
            await self._joins.cancel()
        if self._requeue:
            log.info("the time limit is near: the job is requeued")
            await slurm.requeue(self._job.job_id)
        elif self._stop.is_set():
            await self._stop_steps()
        return await self._end(tasks)

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()

        def stop(requeue: bool) -> None:
            self._requeue = self._requeue or (requeue and not self._stop.is_set())
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop, False)
        loop.add_signal_handler(signal.SIGUSR1, stop, True)

    def _write_files(self) -> None:
        run_dir = self._options.run_dir
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        data = self._config.model_dump(mode="json", exclude_none=True)
        write_atomically(run_dir / "mesh.yaml", yaml.safe_dump(data, sort_keys=False))
        log.info("balancer %s; the mesh's files are in %s", self._config.balancer.address, run_dir)

    async def _start_step(self, number: int) -> asyncio.subprocess.Process:
        """A step with all tasks of a component. One that loses a task or a node goes on with the others."""
        role = (CONTROL, *self._options.roles)[number]
        task = [sys.executable, "-P", "-m", "expertmesh.cli.main", "slurm", "task", role]
        cpus = self._job.cpus_per_task[number]  # since 22.05 srun does not take it from the job
        return await asyncio.create_subprocess_exec(
            "srun",
            f"--het-group={number}",
            "--no-kill",
            "--kill-on-bad-exit=0",
            "--wait=0",
            "--distribution=block",  # each node has all of the roles that its tasks take in turn
            f"--job-name={role}",
            *([f"--cpus-per-task={cpus}"] if cpus is not None else []),
            *task,
            "--run-dir",
            str(self._options.run_dir),
            stdin=asyncio.subprocess.DEVNULL,
        )

    async def _see_end(self, number: int, step: asyncio.subprocess.Process) -> int:
        try:
            status = await step.wait()
        except asyncio.CancelledError:
            step.kill()
            await step.wait()
            raise
        if not self._stop.is_set():
            log.warning("component %d ended with status %d", number, status)
        return status

    async def _bring_servers(self) -> None:
        if self._options.join_script is None:
            await asyncio.Event().wait()
        await self._joins.run()

    async def _stop_steps(self) -> None:
        """A signal that went to this script alone is not known to the tasks; one that comes twice changes nothing."""
        try:
            await slurm.signal_steps(self._job.job_id, "TERM")
        except slurm.SlurmError as error:  # the job is cancelled, and Slurm has told them already
            log.info("%s", error)

    async def _end(self, tasks: Sequence[asyncio.Task[int]]) -> int:
        """When this script was asked to end, so were all tasks; else Slurm ends those left with this script."""
        if not self._stop.is_set():
            control = tasks[0].result()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return control
        _, left = await asyncio.wait(tasks, timeout=STOP_TIMEOUT_S)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return 0


def _free_port(host: str) -> int:
    """One of this node, where the balancer will run, by which ``host`` is its address.

    Somebody may take it before the balancer does; the job then ends, as with a port that is set.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_job(config: MeshConfig, job: Job, options: JobOptions) -> int:
    """
    Raises:
        UserError: the configuration does not fit the job.
        SlurmError: Slurm does not know this node, or does not requeue the job.
    """

    async def run() -> int:
        host = await slurm.node_address(job.node)
        port = config.balancer.port or _free_port(host)
        return await SlurmJob(job_config(config, job, options, host, port), job, options).run()

    # For the steps and the jobs that are started from here.
    os.environ["EXPERTMESH_RUN_DIR"] = str(options.run_dir)
    os.environ["EXPERTMESH_SLURM_JOB"] = str(job.job_id)
    os.environ["EXPERTMESH_BALANCER_NODE"] = job.node
    return asyncio.run(run())
