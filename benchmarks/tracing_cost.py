"""What telemetry costs: CPU time a token with 1 % of requests traced, and with metrics too, against no telemetry.

    PYTHONPATH=benchmarks python benchmarks/tracing_cost.py [--minutes 4] [--ratio 0.01] [--json FILE]

One mesh on the demo model serves the same requests in blocks of about a second. Its processes switch their telemetry
between blocks (``telemetry_switch.py``), in an order drawn anew for each round of one block a state:

    off      no tracing, no metrics: what runs without a section ``telemetry``
    tracing  requests are sampled by --ratio and their spans exported over OTLP
    metrics  metrics are recorded, exported over OTLP and scraped
    both

What is compared is CPU time of all processes of the mesh, so that other work on the machine does not count. Of it

- what requests and steps call of their telemetry is timed call by call, in all four states: its differences are small
  and so is their noise. They are the cost, with what the threads that export took by their own clocks;
- all of it is compared too, as a check that nothing is missed: caches, garbage, gRPC's own threads, which send what is
  exported. That is a difference of large numbers, as uncertain as the machine is noisy.

The target is met where the cost's interval is below it, and the check's is not wholly above it.

Tracing is compared twice a round, with metrics and without, and how far the two differ is the control: it should be
nothing. Intervals of means are by bootstrap over rounds. Beside it a count from below: what a request that is not
sampled and a span take by themselves, times how many there were.
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import tracing_paths
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from telemetry_switch import BACKGROUND, ENDPOINT, METRICS, SPANS

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.v1 import generate_pb2_grpc

MESH = {"attention.servers": 1, "expert.servers": 2}
NUM_STREAMS, NUM_TOKENS, PROMPT_TOKENS = 16, 64, 16
OFF, TRACING, METERED, BOTH = "off", "tracing", "metrics", "both"
STATES = {
    OFF: {"tracing": False, "metrics": False},
    TRACING: {"tracing": True, "metrics": False},
    METERED: {"tracing": False, "metrics": True},
    BOTH: {"tracing": True, "metrics": True},
}
CONTRASTS = {
    "tracing": {TRACING: 0.5, BOTH: 0.5, OFF: -0.5, METERED: -0.5},
    "metrics": {METERED: 0.5, BOTH: 0.5, OFF: -0.5, TRACING: -0.5},
    "both": {BOTH: 1.0, OFF: -1.0},
    "control": {BOTH: 0.5, METERED: -0.5, TRACING: -0.5, OFF: 0.5},
}
"""Each state's part in a difference."""
SCRAPE_INTERVAL_S = 5.0
"""That of deploy/dashboards/prometheus.yaml."""
TARGET, WIDTH = 0.01, 0.005
WARM_UP_ROUNDS = 2
RESAMPLES = 4000
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """CPU seconds of the mesh by state, without the threads that export: all, and those of its telemetry among them."""

    whole: dict[str, float]
    telemetry: dict[str, float]


class Difference(NamedTuple):
    mean: float
    low: float
    high: float

    def plus(self, share: float) -> Difference:
        return Difference(*(bound + share for bound in self))

    def described(self) -> dict[str, Any]:
        return {"mean": round(self.mean, 5), "interval_95": [round(self.low, 5), round(self.high, 5)]}


class Sink(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Takes spans and metrics, and counts the spans by name."""

    def __init__(self) -> None:
        self.spans: Counter[str] = Counter()
        self._lock = threading.Lock()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            return metrics_service_pb2.ExportMetricsServiceResponse()
        spans = [span for part in request.resource_spans for scope in part.scope_spans for span in scope.spans]
        with self._lock:
            self.spans.update(span.name.split()[0] for span in spans)
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


class SwitchedMesh(LocalMesh):
    """Its services listen to ``ask``."""

    def __init__(self, config: MeshConfig, folder: Path) -> None:
        super().__init__(config, StateDir.claim(folder), restart=False)
        self._sockets = folder / "switches"
        self._sockets.mkdir()
        self._connections: list[Connection] = []

    def _command(self, role: str, server_id: str) -> Sequence[str]:
        command = list(super()._command(role, server_id))
        switch = [sys.executable, str(Path(__file__).with_name("telemetry_switch.py")), str(self._sockets)]
        return [*switch, *command[command.index("serve") :]]

    def connect(self) -> None:
        self._connections = [Client(str(self._sockets / server), "AF_UNIX") for server in self.servers]

    def ask(self, **asked: bool) -> Counter[str]:
        """What all services answer, summed: see ``telemetry_switch.Switch``."""
        for connection in self._connections:
            connection.send_bytes(json.dumps(asked).encode())
        found: Counter[str] = Counter()
        for connection in self._connections:
            if not connection.poll(REQUEST_TIMEOUT_S):
                raise TimeoutError("a service does not answer")
            found.update(json.loads(connection.recv_bytes()))
        return found

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()
        super().stop()


async def serve(mesh: SwitchedMesh, seed: int) -> None:
    """A block of traffic, all streams at a time."""
    async with rpc.open_channel(mesh.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)

        async def stream(number: int) -> None:
            prompt = [(seed * 31 + number * 7 + position) % 400 + 1 for position in range(PROMPT_TOKENS)]
            request = build_request(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, seed=number)
            async for _ in stub.Generate(request, timeout=REQUEST_TIMEOUT_S):
                pass

        await asyncio.gather(*(stream(number) for number in range(NUM_STREAMS)))


async def measure(mesh: SwitchedMesh, minutes: float) -> list[Round]:
    """Without the rounds that warm up."""
    dice, rounds = random.Random(1), list[Round]()
    ends_s = time.monotonic() + 60 * minutes
    while len(rounds) < WARM_UP_ROUNDS + 3 or time.monotonic() < ends_s:
        whole, telemetry = {}, {}
        for name in dice.sample(list(STATES), len(STATES)):
            before = mesh.ask(**STATES[name])
            await serve(mesh, len(rounds))
            after = mesh.ask()
            whole[name] = after["cpu_s"] - before["cpu_s"]
            telemetry[name] = after["telemetry_s"] - before["telemetry_s"]
        rounds.append(Round(whole=whole, telemetry=telemetry))
        if len(rounds) % 10 == 0:
            say(f"{len(rounds)} rounds, {max(0.0, ends_s - time.monotonic()):.0f} s to go")
    return rounds[WARM_UP_ROUNDS:]


def difference(rounds: Sequence[Round], name: str, part: Callable[[Round], dict[str, float]]) -> Difference:
    """A contrast of a ``part`` of the CPU time as a share of the whole without telemetry, and where 95 % of the
    resampled means are."""
    parts = CONTRASTS[name]
    off_s = statistics.fmean(one.whole[OFF] for one in rounds)
    found = [sum(sign * part(one)[state] for state, sign in parts.items()) / off_s for one in rounds]
    dice = random.Random(2)
    means = sorted(statistics.fmean(dice.choices(found, k=len(found))) for _ in range(RESAMPLES))
    return Difference(statistics.fmean(found), means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)])


def background_shares(
    before: Counter[str], after: Counter[str], rounds: Sequence[Round], scrape_s: float, wall_s: float
) -> dict[str, float]:
    """What the threads that export took, as shares of the CPU time of the work that they belong to. Spans come of two
    states; metrics go out by the clock, in all of them."""
    by_state = {name: sum(one.whole[name] for one in rounds) for name in STATES}
    everything = sum(by_state.values())
    spent = {name: after[name] - before[name] for name in BACKGROUND}
    return {
        "exporting_spans": spent[SPANS] / (by_state[TRACING] + by_state[BOTH]),
        "exporting_metrics": spent[METRICS] / everything,
        "metrics_endpoint": (spent[ENDPOINT] + scrape_s * wall_s / SCRAPE_INTERVAL_S) / everything,
    }


def counted(spans: int, rounds: Sequence[Round]) -> dict[str, Any]:
    """Tracing from below: its pieces, how often they came, and the share of the CPU time that they make."""
    pieces = tracing_paths.measure(NUM_TOKENS)
    requests = 2 * len(rounds) * NUM_STREAMS  # in the states that trace
    request_us = pieces["request_on_router_us"] + pieces["request_on_attention_server_us"]
    total_us = requests * request_us + spans * pieces["span_us"]
    cpu_us = 1e6 * sum(one.whole[TRACING] + one.whole[BOTH] for one in rounds)
    return {**pieces, "requests": requests, "spans": spans, "share": round(total_us / cpu_us, 6)}


def report(
    rounds: list[Round], shares: dict[str, float], below: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    tokens = NUM_STREAMS * NUM_TOKENS
    metrics_share = shares["exporting_metrics"] + shares["metrics_endpoint"]
    exported = {"tracing": shares["exporting_spans"], "metrics": metrics_share}
    exported["both"] = sum(exported.values())
    cost = {name: difference(rounds, name, lambda one: one.telemetry).plus(share) for name, share in exported.items()}
    check = {name: difference(rounds, name, lambda one: one.whole) for name in CONTRASTS}
    tracing = cost["tracing"]
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()},
        "command": " ".join(["python", "benchmarks/tracing_cost.py", *sys.argv[1:]]),
        "mesh": MESH,
        "traffic": {"streams": NUM_STREAMS, "tokens": NUM_TOKENS, "prompt_tokens": PROMPT_TOKENS},
        "trace_sample_ratio": arguments.ratio,
        "rounds": len(rounds),
        "cpu_us_per_token": {
            name: round(1e6 * statistics.median(one.whole[name] for one in rounds) / tokens, 2) for name in STATES
        },
        "cost": {name: found.described() for name, found in cost.items()},
        "whole_processes_differ_by": {name: found.described() for name, found in check.items()},
        "in_the_background": {name: round(share, 6) for name, share in shares.items()},
        "tracing_counted_from_below": {**below, "with_export": round(below["share"] + shares["exporting_spans"], 6)},
        "target": TARGET,
        "met": tracing.high <= TARGET and check["tracing"].low <= TARGET,
        "narrow_enough": tracing.high - tracing.low <= 2 * WIDTH,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sink, address = stack.enter_context(running_sink())
        settings = {
            "telemetry.otlp_endpoint": address,
            "telemetry.trace_sample_ratio": arguments.ratio,
            "telemetry.metrics_port": 0,
        }
        mesh = SwitchedMesh(with_overrides(MeshConfig(), MESH | settings), folder / "mesh")
        stack.callback(mesh.stop)
        mesh.start()
        mesh.wait_ready(START_TIMEOUT_S)
        mesh.connect()
        at_start = sum(sink.spans.values())
        before, started_s = mesh.ask(), time.monotonic()
        rounds = asyncio.run(measure(mesh, arguments.minutes))
        after, wall_s = mesh.ask(), time.monotonic() - started_s
        scrape_s = statistics.median(mesh.ask(scrape=True)["scrape_s"] for _ in range(5))
        shares = background_shares(before, after, rounds, scrape_s, wall_s)
    spans = sum(sink.spans.values()) - at_start
    return report(rounds, shares, counted(spans, rounds), arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="of measuring")
    parser.add_argument("--ratio", type=float, default=0.01, help="of requests that are traced")
    parser.add_argument("--json", type=Path, default=None, help="where the result goes")
    arguments = parser.parse_args()
    result = run(arguments)
    text = json.dumps(result, indent=1)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
