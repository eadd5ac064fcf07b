"""``expertmesh slurm``: what the scripts in deploy/slurm start."""

from __future__ import annotations

import enum
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.rolling_log import LogSize
from expertmesh.cli.slurm_commands import SlurmError
from expertmesh.cli.slurm_job import JobOptions, run_job
from expertmesh.cli.slurm_task import TaskSupervisor
from expertmesh.mesh.config import load_config
from expertmesh.mesh.slurm import job_from, task_from

app = typer.Typer(help="A mesh as a Slurm job: see docs/slurm.md.", no_args_is_help=True)

RunDirOption = Annotated[
    Path, typer.Option("--run-dir", envvar="EXPERTMESH_RUN_DIR", help="Shared by all nodes: mesh.yaml, logs, state.")
]


class RankRole(enum.StrEnum):
    ATTENTION = "attention"
    EXPERT = "expert"
    BOTH = "both"


@app.command()
def job(
    roles: Annotated[
        list[str],
        typer.Argument(
            metavar="ROLE...",
            help="Of the job's components after the first, in order; attention+expert = its tasks take them in turn.",
        ),
    ],
    run_dir: RunDirOption,
    config_file: Annotated[Path | None, typer.Option("--config", help="mesh.yaml; unset = every default.")] = None,
    join_script: Annotated[
        Path | None, typer.Option(help="Submitted for each server that is missing; unset = none are replaced or added.")
    ] = None,
    replace_after_s: Annotated[
        float, typer.Option("--replace-after", min=0, help="Seconds that a server may be away before that.")
    ] = 120.0,
) -> None:
    """Run in the batch script of a heterogeneous job: component 0 takes the balancer and the routers.

    On SIGTERM all servers stop in good order, and the job ends; on SIGUSR1 it is requeued first.
    """
    _log_to_stderr("job")
    options = JobOptions(
        roles=roles,
        run_dir=run_dir.absolute(),
        join_script=join_script,
        replace_after_s=replace_after_s,
    )
    try:
        raise typer.Exit(run_job(load_config(config_file), job_from(os.environ), options))
    except SlurmError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def task(
    role: Annotated[str, typer.Argument(help="What the tasks of this step are: control, or roles of ranks with +.")],
    run_dir: RunDirOption,
    joins: Annotated[bool, typer.Option("--joins", help="This server has a job of its own.")] = False,
    log_bytes: Annotated[int, typer.Option(min=4096, help="A server's log is rolled before it is larger.")] = 2**26,
    log_keep: Annotated[int, typer.Option(min=1, help="Older logs that are kept.")] = 4,
) -> None:
    """Run under srun: keep this task's server running, and start it again when it dies."""
    _log_to_stderr("task")
    config = load_config(run_dir / "mesh.yaml")
    size = LogSize(max_bytes=log_bytes, keep=log_keep)
    supervisor = TaskSupervisor(config, task_from(os.environ), role, run_dir=run_dir, joins=joins, log_size=size)
    raise typer.Exit(supervisor.run())


def _log_to_stderr(name: str) -> None:
    """Slurm takes it to the job's output."""
    node = os.environ.get("SLURMD_NODENAME", "")
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s {node} {name}: %(message)s")
