"""Steps as one batch and as two micro-batches in turns: time per token of the demo mesh under load, on CPUs.

    python benchmarks/micro_batches.py [--attention 1] [--experts 1] [--streams 8 32 64] [--rounds 12] [--json FILE]

Two equal meshes of attention and expert servers that differ in ``dataplane.micro_batches`` alone serve the same streams
in turn, in changing order, while the other one idles. Of every round: the median time per output token of its streams,
and where the attention servers' step time went, per generated token: their own work, and what they waited for, which
is their metrics' dispatch and combine (the experts' compute is in it). ``hidden`` is the share of that waiting that two
micro-batches save. Wall times: nothing else may run on the machine, and what takes turns needs cores of its own.
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
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.v1 import generate_pb2_grpc

NUM_TOKENS, PROMPT_TOKENS = 96, 16
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 300.0
WARM_UP_ROUNDS = 1
OWN, DISPATCH, COMBINE, EXPERTS = (
    f"expertmesh_{part}_duration_seconds_sum" for part in ("attention_compute", "dispatch", "combine", "expert_compute")
)
TOKENS, STEPS, SPLIT = (
    "vllm:generation_tokens_total",
    "expertmesh_step_duration_seconds_count",
    "expertmesh_split_steps_total",
)


@dataclass
class Rounds:
    """A value for each round with one number of streams."""

    tpot_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    own_us_per_token: list[float] = field(default_factory=list)
    waited_us_per_token: list[float] = field(default_factory=list)
    experts_us_per_token: list[float] = field(default_factory=list)
    split_share: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 3) for name, values in vars(self).items()}


class Mesh:
    def __init__(self, folder: Path, arguments: argparse.Namespace, micro_batches: int) -> None:
        settings = {
            "attention.servers": arguments.attention,
            "expert.servers": arguments.experts,
            "dataplane.micro_batches": micro_batches,
            "telemetry.metrics_port": 0,
        }
        state = StateDir.claim(folder)
        self._mesh = LocalMesh(with_overrides(MeshConfig(), settings), state, restart=False)
        self._mesh.start()
        self._mesh.wait_ready(START_TIMEOUT_S)
        logs = {name: folder / f"{name}.log" for name, server in self._mesh.servers.items() if server.role != "router"}
        self._metrics = {name: _metrics_address(log) for name, log in logs.items() if not name.startswith("balancer")}
        self.rounds: dict[int, Rounds] = {}

    def stop(self) -> None:
        self._mesh.stop()

    async def serve(self, streams: int, seed: int, *, counts: bool) -> None:
        """A round of traffic, all streams at a time."""
        before, started_s = await asyncio.to_thread(self._sums), time.perf_counter()
        async with rpc.open_channel(self._mesh.router, TlsConfig()) as channel:
            stub = generate_pb2_grpc.GenerationServiceStub(channel)

            async def stream(number: int) -> float:
                prompt = [(seed * 31 + number * 7 + position) % 400 + 1 for position in range(PROMPT_TOKENS)]
                request = build_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, seed=number)
                arrived_s, num_tokens = [], 0
                async for message in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                    if message.token_ids:
                        arrived_s.append(time.perf_counter())
                        num_tokens += len(message.token_ids)
                return 1e3 * (arrived_s[-1] - arrived_s[0]) / (num_tokens - 1)

            tpot_ms = await asyncio.gather(*(stream(number) for number in range(streams)))
        seconds, after = time.perf_counter() - started_s, await asyncio.to_thread(self._sums)
        if not counts:
            return
        spent = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in after}
        tokens = spent[f"attention {TOKENS}"]
        found = self.rounds.setdefault(streams, Rounds())
        found.tpot_ms.append(statistics.median(tpot_ms))
        found.tokens_per_s.append(tokens / seconds)
        found.own_us_per_token.append(1e6 * spent[f"attention {OWN}"] / tokens)
        waited_s = spent[f"attention {DISPATCH}"] + spent[f"attention {COMBINE}"]
        found.waited_us_per_token.append(1e6 * waited_s / tokens)
        found.experts_us_per_token.append(1e6 * spent[f"expert {EXPERTS}"] / tokens)
        found.split_share.append(spent.get(f"attention {SPLIT}", 0.0) / spent[f"attention {STEPS}"])

    def _sums(self) -> dict[str, float]:
        """Of every metric, over all servers of a role."""
        sums: dict[str, float] = {}
        for server, address in self._metrics.items():
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
                families = text_string_to_metric_families(answer.read().decode())
            for family in families:
                for sample in family.samples:
                    name = f"{server.partition('-')[0]} {sample.name}"
                    sums[name] = sums.get(name, 0.0) + sample.value
        return sums


def _metrics_address(log: Path) -> str:
    found: str = re.findall(r"metrics on http://(\S+)/metrics", log.read_text(encoding="utf-8", errors="replace"))[-1]
    return found


async def measure(meshes: dict[int, Mesh], arguments: argparse.Namespace) -> None:
    for streams in arguments.streams:
        for number in range(-WARM_UP_ROUNDS, arguments.rounds):
            order = list(meshes) if number % 2 else list(meshes)[::-1]
            for micro_batches in order:
                await meshes[micro_batches].serve(streams, number, counts=number >= 0)
            if number >= 0:
                last = ", ".join(f"{m}: {meshes[m].rounds[streams].tpot_ms[-1]:.2f} ms" for m in meshes)
                print(
                    f"{streams} streams, round {number + 1} of {arguments.rounds}: {last}", file=sys.stderr, flush=True
                )


def report(meshes: dict[int, Mesh], arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for streams in arguments.streams:
        one, two = (meshes[micro_batches].rounds[streams] for micro_batches in (1, 2))
        ratios = [own / other for own, other in zip(two.tpot_ms, one.tpot_ms, strict=True)]
        saved = [1 - own / other for own, other in zip(two.waited_us_per_token, one.waited_us_per_token, strict=True)]
        rows.append(
            {
                "streams": streams,
                "one": one.medians(),
                "two": two.medians(),
                "tpot_two_to_one": round(statistics.median(ratios), 3),
                "hidden": round(statistics.median(saved), 3),
            }
        )
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "command": " ".join(["python", "benchmarks/micro_batches.py", *sys.argv[1:]]),
        "mesh": {"attention.servers": arguments.attention, "expert.servers": arguments.experts},
        "traffic": {"tokens": NUM_TOKENS, "prompt_tokens": PROMPT_TOKENS},
        "rounds": arguments.rounds,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", type=int, default=1, help="attention servers")
    parser.add_argument("--experts", type=int, default=1, help="expert servers")
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32, 64], help="at a time")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        meshes: dict[int, Mesh] = {}
        for micro_batches in (1, 2):
            meshes[micro_batches] = Mesh(folder / f"{micro_batches}", arguments, micro_batches)
            stack.callback(meshes[micro_batches].stop)
        asyncio.run(measure(meshes, arguments))
        result = report(meshes, arguments)
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
