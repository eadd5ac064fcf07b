"""A job of three components that starts again as a whole, and one that stops by a signal of its time limit's.

It takes another minute: `make slurm-test` runs it, `make test` does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from support.slurm import SlurmCluster, until
from support.slurm_mesh import START_TIMEOUT_S, SlurmMesh, expected, slurm

AT_FIRST = {"attention-0": "n3", "attention-1": "n4", "expert-0": "n5", "expert-1": "n6"}
"""Where the ranks run; the balancer is on n1, the router on n2, and n7 is spare."""


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    with slurm(num_nodes=7, cpus=1) as running:
        yield running


@pytest.mark.timeout(290)
def test_job_is_requeued_before_its_time_is_over_and_when_the_balancer_is_lost(cluster: SlurmCluster) -> None:
    mesh = SlurmMesh(cluster, "mesh.sbatch")
    mesh.until_serving(lambda servers: servers == AT_FIRST)
    tokens = expected()

    # What Slurm sends two minutes before the time limit.
    cluster.run("scancel", "--batch", "--signal=USR1", mesh.job)
    start_again(mesh)
    mesh.until_serving(lambda servers: servers.keys() == AT_FIRST.keys())
    assert mesh.generate() == tokens
    assert view(mesh) > 1, "the balancer found its state"

    # The node of the balancer and of the batch script: nobody is left but the routers' tasks.
    cluster.kill_node("n1")
    assert mesh.generate() == tokens
    start_again(mesh)
    again = mesh.until_serving(lambda servers: servers.keys() == AT_FIRST.keys())
    assert "n1" not in again.values()
    assert mesh.generate() == tokens

    # As `--signal=B:TERM@...` does: the script alone is told, and everything stops in good order.
    mesh.end("--batch", "--signal=TERM")
    assert mesh.killed((*again, "balancer", "router-0")) == []


def start_again(mesh: SlurmMesh) -> None:
    """When all components wait to be started again: now, and not when Slurm's credentials have expired."""

    def states() -> list[str]:
        return mesh.cluster.run("squeue", "--noheader", f"--jobs={mesh.job}", "--format=%T").split()

    until(lambda: states() == ["PENDING"] * 3, START_TIMEOUT_S, mesh.logs)
    mesh.cluster.run("scontrol", "update", f"JobId={mesh.job}", "StartTime=now")


def view(mesh: SlurmMesh) -> int:
    return int(json.loads(mesh.expertmesh("balancer", "status", "--json", "--balancer", mesh.balancer))["view"])
