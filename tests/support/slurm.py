"""A real Slurm for tests: a controller and some nodes, all daemons on this machine, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from support.etcd import free_ports

NODE_TIMEOUT_S = 6
START_TIMEOUT_S = 30.0
_POLL_S = 0.1
_DAEMONS = ("munged", "slurmctld", "slurmd")
_COMMANDS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")

# `linuxproc` follows process trees and needs no cgroups, and sends a job's signals to all of its processes: the worst
# case for an orderly end. `bf_interval=1` starts a heterogeneous job within a second instead of half a minute.
_CONFIG = """\
ClusterName=expertmesh
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=30
SlurmdTimeout={node_timeout_s}
InactiveLimit=0
KillWait=30
{nodes}
PartitionName=mesh Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there is no Slurm here; None when it can be started."""
    path = os.pathsep.join((os.environ["PATH"], "/usr/sbin"))
    missing = [name for name in (*_DAEMONS, *_COMMANDS) if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not tested: there is no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "Slurm is not tested: its daemons have to be started by root"


class SlurmCluster:
    """``start`` it, and ``stop`` it in the end, with all that its jobs left.

    Args:
        cpus: of a node; a task takes one.
    """

    def __init__(self, folder: Path, *, num_nodes: int, cpus: int) -> None:
        self.folder = folder
        self.nodes = tuple(f"n{number}" for number in range(1, num_nodes + 1))
        self._cpus = cpus
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._config = folder / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """For Slurm's commands, and what they hand on to jobs: this Python and this package."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"))
        return {**kept, "SLURM_CONF": str(self._config), "PATH": path, "PYTHONSAFEPATH": "1"}

    def start(self) -> None:
        self.folder.chmod(0o711)  # munged insists that everybody can reach its socket
        for name in ("munge", "state", "log", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir(mode=0o711)
        controller_port, *ports = free_ports(1 + len(self.nodes))
        host = socket.gethostname()
        nodes = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cpus} RealMemory=4000"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        text = _CONFIG.format(
            host=host,
            controller_port=controller_port,
            folder=self.folder,
            node_timeout_s=NODE_TIMEOUT_S,
            nodes="\n".join(nodes),
        )
        self._config.write_text(text, encoding="utf-8")
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {name: self.folder / "munge" / name for name in ("key", "socket", "pid", "seed")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
        self._start_daemon("munged", "munged", "--foreground", *options)
        until(files["socket"].exists, START_TIMEOUT_S, lambda: self.logs("munged"))
        self._start_daemon("slurmctld", "slurmctld", "-D", "-f", str(self._config))
        for node in self.nodes:
            self.start_node(node)
        until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), START_TIMEOUT_S, self.logs)

    def start_node(self, node: str) -> None:
        self._start_daemon(node, "slurmd", "-D", "-N", node, "-f", str(self._config))

    def kill_node(self, node: str) -> None:
        """SIGKILL its daemon and everything that runs on it, as if it had lost its power: in an order in which none of
        them sees another one die and has time to act on that."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        dying = self.processes(node)
        sruns = {process for process in dying if _is_named(process, "srun")}
        # Each has a child that ends the step, on all nodes, when it sees its parent gone.
        watchers = {process for process in sruns if _parent(process) in sruns}
        scripts = {parent for srun in sruns - watchers if (parent := _parent(srun)) is not None}
        managers = {manager for script in scripts if (manager := _manager_of(script)) is not None}
        # A script would end its job without its sruns, and what manages it would tell of its end.
        for group in (watchers, managers, scripts, sruns, dying):
            for process in group:
                _kill(process)

    def processes(self, *nodes: str) -> list[psutil.Process]:
        """What runs on these nodes (none given: on any), without their daemons: tasks, what they started, and Slurm's
        managers of steps."""
        asked = nodes or self.nodes
        tasks = [process for process in psutil.process_iter() if self._node_of(process) in asked]
        managers = {parent for task in tasks if (parent := _manager_of(task)) is not None}
        return [*managers, *tasks]

    def run(self, *command: str, **environment: str) -> str:
        """What one of Slurm's commands prints."""
        result = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout.strip()

    def states(self) -> Mapping[str, str]:
        """Of the nodes: idle, allocated, down* ..."""
        try:
            lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        except AssertionError:  # the controller does not answer yet
            return {}
        return dict(map(str.split, lines))

    def queue(self) -> list[str]:
        """Names of the jobs that wait, run or end."""
        return self.run("squeue", "--noheader", "--format=%j").split()

    def logs(self, *names: str, lines: int = 30) -> str:
        """The end of the daemons' logs: what a failing test prints."""
        paths = sorted((self.folder / "log").iterdir())
        chosen = [path for path in paths if not names or path.name in names]
        parts = [[f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]] for path in chosen]
        return "\n".join(line for part in parts for line in part)

    def stop(self) -> None:
        for process in self.processes():
            _kill(process)
        for daemon in reversed(self._daemons.values()):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()
        self._daemons.clear()

    def _start_daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / name).open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
            )

    def _node_of(self, process: psutil.Process) -> str | None:
        """Of this cluster; None for a process of something else."""
        try:
            environment = process.environ()
        except psutil.Error:
            return None
        return environment.get("SLURMD_NODENAME") if environment.get("SLURM_CONF") == str(self._config) else None


def until(condition: Callable[[], bool], timeout_s: float, otherwise: Callable[[], str]) -> None:
    """Ask until ``condition`` holds; fail with ``otherwise()`` when it takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"after {timeout_s:g} s: {otherwise()}"
        time.sleep(_POLL_S)


def _manager_of(task: psutil.Process) -> psutil.Process | None:
    parent = _parent(task)
    return parent if parent is not None and _is_named(parent, "slurmstepd") else None


def _parent(process: psutil.Process) -> psutil.Process | None:
    try:
        return process.parent()
    except psutil.Error:
        return None


def _is_named(process: psutil.Process, start: str) -> bool:
    try:
        return bool(process.name().startswith(start))
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
