"""Slurm's own commands, each with a time-out; what they refuse becomes one error."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 30.0
"""A slurmctld that is busy may let a command wait; one that is away is not waited for."""


class SlurmError(RuntimeError):
    """A command of Slurm failed; the message has the command and what it said."""


async def call(*command: str, environ: Mapping[str, str] | None = None) -> str:
    """What the command printed.

    Args:
        environ: for the command; None = this process's.

    Raises:
        SlurmError: it is not there, ended with another status than 0, or took too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environ,
        )
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be run ({error.strerror})") from None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise SlurmError(f"{command[0]} did not answer within {TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise SlurmError(f"{' '.join(command)} ended with {process.returncode}: {err.decode().strip()}")
    return out.decode()


async def node_address(node: str) -> str:
    """The address by which Slurm itself reaches a node (its NodeAddr).

    Raises:
        SlurmError: slurmctld does not know it, or the name has no address.
    """
    words = (await call("scontrol", "show", "node", node, "--oneliner")).split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    name = fields.get("NodeAddr", node)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SlurmError(f"node {node}: {name} has no address ({error.strerror})") from None
    return str(found[0][4][0])


async def submit(script: Path, arguments: Sequence[str], *, name: str, log: Path) -> int:
    """Queue ``script``; returns the job's number.

    Raises:
        SlurmError: Slurm takes no such job.
    """
    command = ["sbatch", "--parsable", f"--job-name={name}", f"--output={log}", str(script), *arguments]
    # Else srun would take the new job for a part of the one that this process is in.
    own = {key: value for key, value in os.environ.items() if key == "SLURM_CONF" or not key.startswith("SLURM")}
    return int((await call(*command, environ=own)).strip().partition(";")[0])


async def jobs_named(name: str) -> set[int]:
    """Numbers of this user's jobs of that name that wait or run.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    listed = await call("squeue", "--me", "--noheader", f"--name={name}", "--states=PD,CF,R,S", "--format=%A")
    return {int(number) for number in listed.split()}


async def is_down(node: str) -> bool:
    """Whether Slurm has given a node up.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    return (await call("sinfo", "--noheader", f"--nodes={node}", "--format=%T")).strip().startswith("down")


async def is_over(job_id: int) -> bool:
    """Whether a job neither waits nor runs any more.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    try:
        return not (await call("squeue", "--noheader", f"--jobs={job_id}", "--format=%T")).strip()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # it ended so long ago that Slurm has forgotten it
            return True
        raise


async def cancel_named(name: str, *, waiting_only: bool = False) -> None:
    """Cancel this user's jobs of that name.

    Args:
        waiting_only: those that run go on.

    Raises:
        SlurmError: slurmctld does not answer.
    """
    await call("scancel", "--me", f"--name={name}", *(["--state=PENDING"] if waiting_only else []))


async def signal_steps(job_id: int, name: str) -> None:
    """Send a signal to all tasks of a job, of all its components, but not to its batch script.

    Raises:
        SlurmError: a node does not answer, or the job is ending by itself.
    """
    await call("scancel", f"--signal={name}", str(job_id))


async def requeue(job_id: int) -> None:
    """
    Raises:
        SlurmError: the job cannot be requeued.
    """
    await call("scontrol", "requeue", str(job_id))
