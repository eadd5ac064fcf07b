"""A real job script on a real Slurm of four nodes: tokens, a node that dies and comes back, scaling, scancel."""

from __future__ import annotations

import psutil
import pytest

from support.slurm import SlurmCluster, until
from support.slurm_mesh import START_TIMEOUT_S, SlurmMesh, expected, slurm

pytestmark = pytest.mark.slow

AT_FIRST = {"attention-0": "n3", "expert-0": "n3", "attention-1": "n4", "expert-1": "n4"}
"""Where the ranks run; the balancer is on n1 and the router on n2, each with a processor to spare."""
LOST, SPARE = "n4", {"n1", "n2"}


@pytest.mark.timeout(290)
def test_job_outlives_a_node_grows_and_ends_clean() -> None:
    with slurm(num_nodes=4, cpus=2) as cluster:
        mesh = SlurmMesh(cluster, "mesh-4-nodes.sbatch")
        tokens = expected()
        mesh.until_serving(lambda servers: servers == AT_FIRST)
        assert mesh.generate() == tokens

        # A node dies. The mesh goes on without its servers.
        cluster.kill_node(LOST)
        left = {server: node for server, node in AT_FIRST.items() if node != LOST}
        mesh.until_serving(lambda servers: bool(servers) and LOST not in servers.values())
        assert mesh.generate() == tokens

        # Others come, in jobs of their own, on the processors that are spare.
        replaced = mesh.until_serving(lambda servers: len(servers) == len(AT_FIRST))
        newcomers = {server: node for server, node in replaced.items() if server not in left}
        assert set(newcomers.values()) == SPARE
        assert sorted(server.partition("-j")[0] for server in newcomers) == ["attention", "expert"]
        assert mesh.generate() == tokens

        # A rank that dies is started again where it was, with no processor to spare.
        killed = rank_process(cluster, "attention-0")
        assert killed is not None
        killed.kill()
        until(lambda: rank_process(cluster, "attention-0") not in (None, killed), START_TIMEOUT_S, mesh.logs)
        again = mesh.until_serving(lambda servers: len(servers) == len(AT_FIRST))
        assert again == replaced
        assert mesh.generate() == tokens

        # Slurm has given the node up, and the job has gone on. The node is back, and one more server is asked for.
        until(lambda: cluster.states()[LOST] == "down*", START_TIMEOUT_S, mesh.logs)
        assert cluster.run("squeue", "--noheader", f"--jobs={mesh.job}", "--format=%T").split() == ["RUNNING"] * 2
        cluster.start_node(LOST)
        until(lambda: cluster.states()[LOST] == "idle", START_TIMEOUT_S, mesh.logs)
        mesh.expertmesh("balancer", "add", "expert", "--no-wait", "--balancer", mesh.balancer)
        grown = mesh.until_serving(lambda servers: len(servers) == len(AT_FIRST) + 1)
        assert LOST in grown.values()
        assert mesh.generate() == tokens

        mesh.end()
        assert mesh.killed((*grown, "balancer", "router-0")) == []


def rank_process(cluster: SlurmCluster, server_id: str) -> psutil.Process | None:
    """The process that serves; None while there is none."""

    def serves(process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:
            return False
        return "serve" in words and server_id in words

    return next((process for process in cluster.processes() if serves(process)), None)
