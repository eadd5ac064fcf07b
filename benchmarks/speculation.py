"""What prompt lookup brings on the demo mesh: acceptance rate and tokens a second, with drafts and without.

    python benchmarks/speculation.py [--rounds 5] [--json FILE]

The demo's prompts, greedily as they are (a small model soon repeats itself), greedily written three times (what prompt
lookup is for: text that repeats what stands before), and sampled (text that hardly repeats anything). Rounds with
drafts and without take turns on one mesh (a request can ask for none), so that a machine that changes its speed is the
same for both, and have to give the same tokens. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh.client import GenerateClient, build_request
from expertmesh.mesh.config import MeshConfig

PROMPTS_FILE = Path(__file__).parents[1] / "demo/prompts.jsonl"
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "greedy": (1, {"temperature": 0.0}),
    "repetitive": (3, {"temperature": 0.0}),
    "sampled": (1, {"temperature": 1.0, "seed": 1}),
}
"""How often a prompt stands there, and how its tokens are chosen."""
CONCURRENCY = (1, 8)
NUM_TOKENS = 64
NUM_PROMPTS = 16
SETTINGS = {"speculation.method": "ngram", "telemetry.metrics_port": 0}
COUNTERS = {
    "drafted": "vllm:spec_decode_num_draft_tokens_total",
    "accepted": "vllm:spec_decode_num_accepted_tokens_total",
}
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0


class Bench:
    """Rounds on one mesh."""

    def __init__(self, mesh: LocalMesh, client: GenerateClient, prompts: Sequence[str]) -> None:
        self._mesh = mesh
        self._client = client
        self._prompts = prompts

    async def case(self, kind: str, concurrency: int, num_rounds: int) -> dict[str, Any]:
        """Medians of the rounds of both modes.

        Raises:
            SystemExit: drafts changed a token.
        """
        repeats, sampling = KINDS[kind]
        prompts = [text * repeats for text in self._prompts]
        speeds: dict[bool, list[float]] = {True: [], False: []}
        expected, _ = await self._round(
            prompts, concurrency, sampling | {"disable_speculation": True}
        )  # prefixes are cached from here on
        before = self._counts()
        for _ in range(num_rounds):
            for drafts in (True, False):
                options = sampling | {"disable_speculation": not drafts}
                tokens, seconds = await self._round(prompts, concurrency, options)
                if tokens != expected:
                    raise SystemExit(f"{kind}, {concurrency} at a time: other tokens {'with' if drafts else 'without'}")
                speeds[drafts].append(sum(map(len, tokens)) / seconds)
        counts = {name: count - before[name] for name, count in self._counts().items()}
        with_s, without_s = (statistics.median(speeds[drafts]) for drafts in (True, False))
        row = {
            "prompts": kind,
            "concurrency": concurrency,
            "acceptance_rate": round(counts["accepted"] / counts["drafted"], 3) if counts["drafted"] else None,
            "drafted_per_token": round(counts["drafted"] / (num_rounds * sum(map(len, expected))), 3),
            "tokens_per_s": {"with_drafts": round(with_s, 1), "without": round(without_s, 1)},
            "speedup": round(with_s / without_s, 3),
            "speedups": [round(on / off, 3) for on, off in zip(speeds[True], speeds[False], strict=True)],
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row

    async def _round(
        self, prompts: Sequence[str], concurrency: int, sampling: dict[str, Any]
    ) -> tuple[list[list[int]], float]:
        """The tokens of each prompt, and the seconds of all."""
        places = asyncio.Semaphore(concurrency)

        async def ask(prompt: str) -> list[int]:
            request = build_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, **sampling)
            async with places:
                return (await self._client.complete(request, timeout_s=REQUEST_TIMEOUT_S)).token_ids

        started_s = time.perf_counter()
        tokens = await asyncio.gather(*map(ask, prompts))
        return tokens, time.perf_counter() - started_s

    def _counts(self) -> dict[str, float]:
        """Of all attention servers, since they started."""
        counts = dict.fromkeys(COUNTERS, 0.0)
        for server in self._mesh.servers.values():
            if server.role != "attention":
                continue
            log = (self._mesh.state_dir / f"{server.id}.log").read_text(encoding="utf-8", errors="replace")
            with urllib.request.urlopen(re.findall(r"metrics on (http://\S+)", log)[-1], timeout=10) as response:
                families = list(text_string_to_metric_families(response.read().decode()))
            samples = [sample for family in families for sample in family.samples]
            for name, metric in COUNTERS.items():
                counts[name] += sum(sample.value for sample in samples if sample.name == metric)
        return counts


async def measure(folder: Path, num_rounds: int) -> list[dict[str, Any]]:
    lines = PROMPTS_FILE.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines][:: max(1, len(lines) // NUM_PROMPTS)]
    mesh = LocalMesh(with_overrides(MeshConfig(), SETTINGS), StateDir.claim(folder), restart=False)
    try:
        await asyncio.to_thread(mesh.start)
        await asyncio.to_thread(mesh.wait_ready, START_TIMEOUT_S)
        async with GenerateClient(mesh.router) as client:
            bench = Bench(mesh, client, prompts)
            return [await bench.case(kind, n, num_rounds) for kind in KINDS for n in CONCURRENCY]
    finally:
        await asyncio.to_thread(mesh.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="with drafts and without, of each case")
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expertmesh-speculation-") as folder:
        rows = asyncio.run(measure(Path(folder), arguments.rounds))
    result = {
        "command": " ".join(["python", "benchmarks/speculation.py", f"--rounds {arguments.rounds}"]),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "load_average": os.getloadavg()[0]},
        "settings": SETTINGS | {"tokens": NUM_TOKENS, "num_speculative_tokens": MeshConfig().speculation.max_tokens},
        "cases": rows,
    }
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
