"""What telemetry costs: CPU time per token with 1 % of requests traced, metrics exported and scraped, against none.

    python benchmarks/tracing_cost.py [--rounds 40] [--ratio 0.01] [--json FILE]

Three equal meshes on the demo model: one without telemetry, one with it (OTLP of traces and metrics to a sink in this
process, /metrics on), and a control, without telemetry like the first: how much it differs from that one is what the
method cannot tell apart. Rounds go over the three in changing order, each serves the same requests in turn while the
others idle, so that a machine that changes its speed is the same for all. CPU time is that of all processes of a mesh,
user and system, so that what other work does to wall time does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import psutil
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.v1 import generate_pb2_grpc

MESH = {"attention.servers": 1, "expert.servers": 2}
OFF, ON, CONTROL = "off", "on", "control"
NUM_STREAMS, NUM_TOKENS, PROMPT_TOKENS = 32, 128, 16
TARGET = 0.01
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0
RESAMPLES = 2000


class Sink(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Takes spans and metrics, and counts the spans."""

    def __init__(self) -> None:
        self.num_spans = 0

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            return metrics_service_pb2.ExportMetricsServiceResponse()
        self.num_spans += sum(len(scope.spans) for part in request.resource_spans for scope in part.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def running_sink() -> Iterator[tuple[Sink, str]]:
    sink = Sink()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(sink, server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(sink, server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield sink, address
        finally:
            server.stop(None).wait(10)


@dataclass
class Blocks:
    """What a mesh took for each round, in its order."""

    cpu_us_per_token: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)


class Mesh:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._mesh = LocalMesh(with_overrides(MeshConfig(), MESH | settings), StateDir.claim(folder))
        self._mesh.start()
        self._mesh.wait_ready(START_TIMEOUT_S)
        self._processes = [psutil.Process(server.pid) for server in self._mesh.servers.values() if server.pid]
        self.blocks = Blocks()

    def stop(self) -> None:
        self._mesh.stop()

    def _cpu_s(self) -> float:
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._processes))

    async def serve(self, seed: int, *, counts: bool) -> None:
        """A block of traffic, all streams at a time."""
        started_s, cpu_s = time.perf_counter(), self._cpu_s()
        async with rpc.open_channel(self._mesh.router, TlsConfig()) as channel:
            stub = generate_pb2_grpc.GenerationServiceStub(channel)

            async def stream(number: int) -> None:
                prompt = [(seed * 31 + number * 7 + position) % 400 + 1 for position in range(PROMPT_TOKENS)]
                request = build_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, seed=number)
                async for _ in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                    pass

            await asyncio.gather(*(stream(number) for number in range(NUM_STREAMS)))
        if counts:
            tokens = NUM_STREAMS * NUM_TOKENS
            self.blocks.cpu_us_per_token.append((self._cpu_s() - cpu_s) / tokens * 1e6)
            self.blocks.tokens_per_s.append(tokens / (time.perf_counter() - started_s))


def overhead(mesh: Blocks, base: Blocks) -> dict[str, Any]:
    """Of the CPU time per token, round by round: the median, and where 95 % of the resampled medians are."""
    ratios = [own / other - 1 for own, other in zip(mesh.cpu_us_per_token, base.cpu_us_per_token, strict=True)]
    dice = random.Random(1)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    interval = [medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]]
    return {"median": round(statistics.median(ratios), 5), "interval_95": [round(bound, 5) for bound in interval]}


async def measure(meshes: dict[str, Mesh], rounds: int) -> None:
    for number in range(-2, rounds):  # the first two warm up
        names: Sequence[str] = list(meshes)
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            await meshes[name].serve(number, counts=number >= 0)
        if number >= 0:
            say(f"round {number + 1} of {rounds}: " + ", ".join(_last(name, meshes[name]) for name in names))


def _last(name: str, mesh: Mesh) -> str:
    return f"{name} {mesh.blocks.cpu_us_per_token[-1]:.0f} µs/token"


def report(meshes: dict[str, Mesh], num_spans: int, arguments: argparse.Namespace) -> dict[str, Any]:
    blocks = {name: mesh.blocks for name, mesh in meshes.items()}
    cost = overhead(blocks[ON], blocks[OFF])
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "command": " ".join(["python", "benchmarks/tracing_cost.py", *sys.argv[1:]]),
        "mesh": MESH,
        "traffic": {"streams": NUM_STREAMS, "tokens": NUM_TOKENS, "prompt_tokens": PROMPT_TOKENS},
        "rounds": arguments.rounds,
        "trace_sample_ratio": arguments.ratio,
        "spans": num_spans,
        "cpu_us_per_token": {name: round(statistics.median(b.cpu_us_per_token), 2) for name, b in blocks.items()},
        "tokens_per_s": {name: round(statistics.median(b.tokens_per_s), 1) for name, b in blocks.items()},
        "telemetry_costs": cost,
        "control_differs_by": overhead(blocks[CONTROL], blocks[OFF]),
        "target": TARGET,
        "met": cost["interval_95"][1] <= TARGET,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ratio", type=float, default=0.01, help="of requests that are traced")
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sink, address = stack.enter_context(running_sink())
        traced = {
            "telemetry.otlp_endpoint": address,
            "telemetry.trace_sample_ratio": arguments.ratio,
            "telemetry.metrics_port": 0,
        }
        meshes: dict[str, Mesh] = {}
        for name in (OFF, ON, CONTROL):
            meshes[name] = Mesh(folder / name, traced if name == ON else {})
            stack.callback(meshes[name].stop)
        asyncio.run(measure(meshes, arguments.rounds))
        result = report(meshes, sink.num_spans, arguments)
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
