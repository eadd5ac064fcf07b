"""A mesh on a real Slurm, submitted with the job script that users submit."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml

from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import admin_pb2, admin_pb2_grpc, mesh_pb2
from support.mesh import demo_prompts, generate_all, greedy_request
from support.reference import encode, greedy
from support.slurm import SlurmCluster, until, why_not

DEPLOY = Path(__file__).parents[2] / "deploy/slurm"
START_TIMEOUT_S = 90.0
ASK_TIMEOUT_S = 5.0
REPLACE_AFTER_S = 2
NUM_TOKENS = 16
STOP_TIMEOUT_S = 60.0


@contextmanager
def slurm(num_nodes: int, cpus: int) -> Iterator[SlurmCluster]:
    """A cluster that runs, or a skipped test."""
    reason = why_not()
    if reason is not None:
        print(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="expertmesh-slurm-") as folder:
        running = SlurmCluster(Path(folder), num_nodes=num_nodes, cpus=cpus)
        try:
            running.start()
            yield running
        finally:
            running.stop()


class SlurmMesh:
    """A mesh that one of the job scripts runs, as its user sees it.

    Args:
        script: a file of deploy/slurm.
    """

    def __init__(self, cluster: SlurmCluster, script: str) -> None:
        self.cluster = cluster
        self.run_dir = cluster.folder / "run"
        self._output = cluster.folder / "job.out"
        config = yaml.safe_load((DEPLOY / "mesh.yaml").read_text(encoding="utf-8"))
        config["router"]["port"] = config["balancer"]["port"] = 0  # any free one: all nodes are this machine
        file = cluster.folder / "mesh.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.job = cluster.run(
            "sbatch",
            "--parsable",
            f"--output={self._output}",
            str(DEPLOY / script),
            str(file),
            EXPERTMESH_SLURM_DIR=str(DEPLOY),
            EXPERTMESH_RUN_DIR=str(self.run_dir),
            EXPERTMESH_REPLACE_AFTER_S=str(REPLACE_AFTER_S),
        )

    @property
    def balancer(self) -> str:
        """Its address, as the job's output says; '' before it does."""
        return self._said(r"balancer (\S+); the mesh's files")

    @property
    def router(self) -> str:
        return self._said(r"router-0: ready on (\S+)")

    def _said(self, pattern: str) -> str:
        text = self._output.read_text(encoding="utf-8") if self._output.exists() else ""
        return next(reversed(re.findall(pattern, text)), "")  # a job that was requeued says it again

    def expertmesh(self, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr + self.logs()
        return result.stdout

    def status(self) -> admin_pb2.GetStatusResponse | None:
        """None while no balancer answers."""

        address = self.balancer
        if not address:
            return None

        async def ask() -> admin_pb2.GetStatusResponse:
            async with rpc.open_channel(address, TlsConfig()) as channel:
                stub = admin_pb2_grpc.AdminServiceStub(channel)
                return await stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT_S)

        try:
            return asyncio.run(ask())
        except grpc.aio.AioRpcError:
            return None

    def serving(self) -> dict[str, str]:
        """Rank → node of those that serve in the current view; empty while nothing does, and without a balancer."""
        status = self.status()
        if status is None or not status.serving:
            return {}
        ranks = [server for server in status.servers if server.HasField("rank")]
        return {rank.server_id: rank.node for rank in ranks if rank.state == mesh_pb2.SERVER_STATE_SERVING}

    def until_serving(
        self, is_so: Callable[[dict[str, str]], bool], timeout_s: float = START_TIMEOUT_S
    ) -> dict[str, str]:
        seen: list[dict[str, str]] = []

        def holds() -> bool:
            seen.append(self.serving())
            return is_so(seen[-1])

        until(holds, timeout_s, lambda: f"{seen[-1]}\n{self.logs()}")
        return seen[-1]

    def generate(self) -> list[list[int]]:
        """Greedy tokens for two of the demo's prompts."""
        requests = [greedy_request(text, NUM_TOKENS) for text in prompts()]
        try:
            outputs = asyncio.run(generate_all(self.router, requests, concurrency=2))
        except* grpc.aio.AioRpcError as errors:
            pytest.fail(f"{errors.exceptions}\n{self.logs()}")
        return [output.token_ids for output in outputs]

    def end(self, *signal: str) -> None:
        """Cancel the job, or send it a signal, and wait until nothing of it is left.

        Args:
            signal: options of scancel.
        """
        self.cluster.run("scancel", *signal, self.job)
        until(lambda: not self.cluster.queue(), STOP_TIMEOUT_S, self.logs)
        until(lambda: not self.cluster.processes(), STOP_TIMEOUT_S, lambda: f"still run: {self.cluster.processes()}")

    def killed(self, servers: Iterable[str]) -> list[str]:
        """Those that did not stop in good order, with the end of their logs."""
        logs = {server: (self.run_dir / "logs" / f"{server}.log").read_text(encoding="utf-8") for server in servers}
        return [
            f"{server}: {log[-500:]}" for server, log in logs.items() if not log.rstrip().endswith(f"{server} stopped")
        ]

    def logs(self) -> str:
        files = [self._output, *sorted(self.run_dir.glob("logs/*"))]
        parts = [f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files if file.exists()]
        return "\n".join((*parts, self.cluster.logs(lines=10)))


def prompts() -> list[str]:
    return [prompt.text for prompt in demo_prompts()[:2]]


def expected() -> list[list[int]]:
    model = demo_model_path()
    encoded = tuple(encode(model, text) for text in prompts())
    eos = json.loads((model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return [list(tokens) for tokens in greedy(model, encoded, NUM_TOKENS, eos)]
