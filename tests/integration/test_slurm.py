"""The real job script on a real Slurm: tokens, a node that dies and comes back, scaling, scancel."""

from __future__ import annotations

import psutil
import pytest

from support.slurm import NODES, SlurmCluster, until
from support.slurm_mesh import AT_FIRST, START_TIMEOUT_S, SlurmMesh, cluster, expected

__all__ = ["cluster"]
pytestmark = pytest.mark.slow

LOST, ITS_SERVER, SPARE = "n6", "expert-1", "n7"


@pytest.mark.timeout(240)
def test_job_outlives_a_node_grows_and_ends_clean(cluster: SlurmCluster) -> None:
    mesh = SlurmMesh(cluster)
    mesh.until_serving(lambda servers: servers == AT_FIRST)
    tokens = expected()
    assert mesh.generate() == tokens

    # A node dies. The mesh goes on without its server.
    cluster.kill_node(LOST)
    left = mesh.until_serving(lambda servers: bool(servers) and ITS_SERVER not in servers)
    assert left.items() >= {server: node for server, node in AT_FIRST.items() if node != LOST}.items()
    assert mesh.generate() == tokens

    # Another server comes, in a job of its own, on the node that is spare.
    replaced = mesh.until_serving(lambda servers: SPARE in servers.values())
    newcomer = next(server for server, node in replaced.items() if node == SPARE)
    assert newcomer.startswith("expert-j")
    assert mesh.generate() == tokens

    # A rank that dies is started again where it was, with no node to spare.
    killed = rank_process(cluster, "attention-1")
    assert killed is not None
    killed.kill()
    until(lambda: rank_process(cluster, "attention-1") not in (None, killed), START_TIMEOUT_S, mesh.logs)
    again = mesh.until_serving(lambda servers: len(servers) == 4)
    assert again == replaced
    assert mesh.generate() == tokens

    # Slurm has given the node up, and the job has gone on. The node is back, and one more server is asked for.
    until(lambda: cluster.states()[LOST] == "down*", START_TIMEOUT_S, mesh.logs)
    assert cluster.run("squeue", "--noheader", f"--jobs={mesh.job}", "--format=%T").split() == ["RUNNING"] * 3
    cluster.start_node(LOST)
    until(lambda: cluster.states()[LOST] == "idle", START_TIMEOUT_S, mesh.logs)
    mesh.expertmesh("balancer", "add", "expert", "--no-wait", "--balancer", mesh.balancer)
    grown = mesh.until_serving(lambda servers: len(servers) == 5)
    assert LOST in grown.values()
    assert mesh.generate() == tokens

    cluster.run("scancel", mesh.job)
    until(lambda: not cluster.queue(), START_TIMEOUT_S, mesh.logs)
    until(lambda: not cluster.processes(*NODES), 5, lambda: f"still run: {cluster.processes(*NODES)}")
    for server in (*grown, "balancer", "router-0"):
        log = (mesh.run_dir / "logs" / f"{server}.log").read_text(encoding="utf-8")
        assert log.rstrip().endswith(f"{server} stopped"), f"{server} was killed: {log[-500:]}"


def rank_process(cluster: SlurmCluster, server_id: str) -> psutil.Process | None:
    """The process that serves; None while there is none."""

    def serves(process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:
            return False
        return "serve" in words and server_id in words

    return next((process for process in cluster.processes(*NODES) if serves(process)), None)
