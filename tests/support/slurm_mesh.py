"""A mesh on a real Slurm, submitted with the job script that users submit."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.mesh.model.demo import demo_model_path
from support.etcd import free_ports
from support.mesh import demo_prompts
from support.reference import encode, greedy
from support.slurm import SlurmCluster, until, why_not

DEPLOY = Path(__file__).parents[2] / "deploy/slurm"
START_TIMEOUT_S = 90.0
REPLACE_AFTER_S = 2
NUM_TOKENS = 16
AT_FIRST = {"attention-0": "n3", "attention-1": "n4", "expert-0": "n5", "expert-1": "n6"}
"""Where the ranks run; the balancer is on n1, the router on n2, and n7 is spare."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = why_not()
    if reason is not None:
        print(reason)
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="expertmesh-slurm-") as folder:
        running = SlurmCluster(Path(folder))
        try:
            running.start()
            yield running
        finally:
            running.stop()


class SlurmMesh:
    """A mesh that ``mesh.sbatch`` runs, as its user sees it."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster
        self.run_dir = cluster.folder / "run"
        router_port, balancer_port = free_ports(2)
        self.router, self.balancer = f"127.0.0.1:{router_port}", f"127.0.0.1:{balancer_port}"  # as all nodes are
        config = yaml.safe_load((DEPLOY / "mesh.yaml").read_text(encoding="utf-8"))
        config["router"]["port"], config["balancer"]["port"] = router_port, balancer_port
        file = cluster.folder / "mesh.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self.job = cluster.run(
            "sbatch",
            "--parsable",
            f"--output={cluster.folder}/job.out",
            str(DEPLOY / "mesh.sbatch"),
            str(file),
            EXPERTMESH_SLURM_DIR=str(DEPLOY),
            EXPERTMESH_RUN_DIR=str(self.run_dir),
            EXPERTMESH_REPLACE_AFTER_S=str(REPLACE_AFTER_S),
        )

    def expertmesh(self, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "expertmesh.cli.main", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr + self.logs()
        return result.stdout

    def serving(self) -> dict[str, str]:
        """Rank → node of those that serve in the current view; empty while nothing does, and without a balancer."""
        try:
            status = json.loads(self.expertmesh("balancer", "status", "--json", "--balancer", self.balancer))
        except AssertionError:
            return {}
        servers = status["servers"] if status["serving"] else []
        ranks = [server for server in servers if server["role"] != "router" and server["state"] == "serving"]
        return {server["id"]: server["node"] for server in ranks}

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
        prompts = [prompt.text for prompt in demo_prompts()[:2]]
        options = ["--router", self.router, "--max-tokens", str(NUM_TOKENS), "--temperature", "0", "--json"]
        lines = self.expertmesh("generate", *options, *prompts).splitlines()
        answers: list[dict[str, Any]] = [json.loads(line) for line in lines]
        return [answer["token_ids"] for answer in answers]

    def logs(self) -> str:
        files = [self.cluster.folder / "job.out", *sorted(self.run_dir.glob("logs/*"))]
        parts = [f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files if file.exists()]
        return "\n".join((*parts, self.cluster.logs(lines=10)))


def expected() -> list[list[int]]:
    model = demo_model_path()
    prompts = tuple(encode(model, prompt.text) for prompt in demo_prompts()[:2])
    eos = json.loads((model / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    return [list(tokens) for tokens in greedy(model, prompts, NUM_TOKENS, eos)]
