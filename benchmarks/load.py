"""A thousand streams at a time through both doors of the demo mesh, from a foreign client.

    python benchmarks/load.py [--streams 1000] [--seconds 300] [--out benchmarks/results/load.json]

k6 runs tests/foreign/load.js: half of the streams over HTTP (server-sent events), half over gRPC; when one ends, the
next begins. One request a second is wrong on purpose. The run is good when k6's thresholds hold (every stream whole and
with all its tokens, no failed request, 95 % of the streams within the time that is given), nothing was refused but on
purpose, and no service's memory grows: the median of the last fifth of the run is compared with that of the third one.
The exit status is 1 when it is not good.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir, write_atomically
from expertmesh.cli.up import with_overrides
from expertmesh.mesh.config import MeshConfig

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/foreign/load.js"
SAMPLE_INTERVAL_S = 1.0
STOP_MARGIN_S = 180.0
MAX_GROWTH, MAX_GROWTH_BYTES = 0.03, 8 * 2**20
"""What counts as flat: allocators keep a little more now and then."""
SETTINGS = {
    "telemetry.metrics_port": 0,
    "router.max_requests_per_tenant": 4096,
    # Enough for all that run, and used up within two minutes: memory of the cache counts from its first use.
    "attention.num_kv_blocks": 2048,
}
ON_PURPOSE = {"invalid_argument", "not_found"}
ON_PURPOSE_CODES = {"200", "400", "404"}


class MemoryWatch:
    """Resident bytes of every service, once a second, on a thread."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._processes = {name: psutil.Process(server.pid) for name, server in mesh.servers.items() if server.pid}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self.samples: dict[str, list[int]] = {name: [] for name in self._processes}

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            for name, process in self._processes.items():
                self.samples[name].append(process.memory_info().rss)

    def report(self) -> dict[str, dict[str, Any]]:
        """Of every service: MiB in the middle and at the end, whether that is flat, and in each tenth of the run."""
        return {name: _growth(samples) for name, samples in self.samples.items()}

    def cpu_s(self) -> dict[str, float]:
        times = {name: process.cpu_times() for name, process in self._processes.items()}
        return {name: round(spent.user + spent.system, 1) for name, spent in times.items()}


def _growth(samples: list[int]) -> dict[str, Any]:
    fifth = max(1, len(samples) // 5)
    middle, end = statistics.median(samples[2 * fifth : 3 * fifth] or samples), statistics.median(samples[-fifth:])
    is_flat = end - middle <= max(MAX_GROWTH * middle, MAX_GROWTH_BYTES)
    tenth = max(1, len(samples) // 10)
    curve = [_mib(statistics.median(samples[begin : begin + tenth])) for begin in range(0, len(samples), tenth)][:10]
    return {"middle_mib": _mib(middle), "end_mib": _mib(end), "flat": is_flat, "curve_mib": curve}


def _mib(size: float) -> float:
    return round(size / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="at a time, over both doors together")
    parser.add_argument("--seconds", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=32, help="of every stream")
    parser.add_argument("--max-p95-s", type=float, default=60.0, help="95 %% of the streams end within so many seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/load.json")
    arguments = parser.parse_args()
    k6 = shutil.which("k6", path=str(Path(sys.executable).parent)) or shutil.which("k6")
    if k6 is None:
        sys.exit("error: k6 is not installed; it comes with the extra `dev`")
    with tempfile.TemporaryDirectory(prefix="expertmesh-load-") as folder:
        config = with_overrides(MeshConfig(), SETTINGS)
        with LocalMesh(config, StateDir.claim(Path(folder) / "mesh")) as mesh, MemoryWatch(mesh) as memory:
            cpu_before_s = memory.cpu_s()
            started_s = time.monotonic()
            summary = run_k6(k6, mesh, arguments, Path(folder))
            wall_s = time.monotonic() - started_s
            cpu_s = {name: round(after - cpu_before_s[name], 1) for name, after in memory.cpu_s().items()}
            refused = refusals(mesh)
    result = report(arguments, summary, memory, wall_s, refused) | {"cpu_s": cpu_s}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(0 if result["good"] else 1)


def run_k6(k6: str, mesh: LocalMesh, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """k6's figures and the thresholds that did not hold."""
    file = folder / "summary.json"
    environment = {
        **os.environ,
        "EXPERTMESH_HTTP": f"http://{mesh.http}",
        "EXPERTMESH_ROUTER": mesh.router,
        "HTTP_STREAMS": str(arguments.streams // 2),
        "GRPC_STREAMS": str(arguments.streams - arguments.streams // 2),
        "DURATION": f"{arguments.seconds}s",
        "MAX_TOKENS": str(arguments.max_tokens),
        "MAX_P95_MS": str(round(1000 * arguments.max_p95_s)),
        "PROTO": str(ROOT / "proto"),
        "SUMMARY": str(file),
        "K6_NO_USAGE_REPORT": "true",
    }
    process = subprocess.run(
        [k6, "run", "--quiet", "--no-color", str(SCRIPT)],
        env=environment,
        timeout=arguments.seconds + STOP_MARGIN_S,
        check=False,
    )
    if not file.exists():
        sys.exit(f"error: k6 ended with {process.returncode} and no summary")
    summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return summary


def refusals(mesh: LocalMesh) -> dict[str, dict[str, float]]:
    """What the router refused, by reason, and its HTTP answers, by status."""
    with urllib.request.urlopen(f"http://{mesh.http}/metrics", timeout=10) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    reasons, codes = {}, {}
    for sample in families["expertmesh_requests_rejected"].samples:
        if sample.name.endswith("_total") and sample.value:
            reasons[sample.labels["reason"]] = sample.value
    for sample in families["expertmesh_http_requests"].samples:
        if sample.name.endswith("_total") and sample.labels["route"] != "/metrics":
            codes[sample.labels["code"]] = codes.get(sample.labels["code"], 0) + sample.value
    return {"reasons": reasons, "http_codes": codes}


def report(
    arguments: argparse.Namespace,
    summary: dict[str, Any],
    memory: MemoryWatch,
    wall_s: float,
    refused: dict[str, dict[str, float]],
) -> dict[str, Any]:
    metrics, rss = summary["metrics"], memory.report()

    def values(name: str) -> dict[str, float]:
        return {key: round(value, 2) for key, value in metrics.get(name, {}).get("values", {}).items()}

    unwanted = [*sorted(set(refused["reasons"]) - ON_PURPOSE), *sorted(set(refused["http_codes"]) - ON_PURPOSE_CODES)]
    is_flat = all(service["flat"] for service in rss.values())
    return {
        "command": " ".join(["python", "benchmarks/load.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "settings": {key: value for key, value in vars(arguments).items() if key != "out"},
        "good": not summary["failed_thresholds"] and not unwanted and is_flat,
        "failed_thresholds": summary["failed_thresholds"],
        "unwanted_errors": unwanted,
        "refused": refused,
        "memory": rss,
        "wall_s": round(wall_s, 1),
        "output_tokens_per_s": round(values("tokens").get("count", 0) / wall_s, 1),
        "http_stream_ms": values("http_stream_duration"),
        "http_first_byte_ms": values("http_first_byte"),
        "grpc_stream_ms": values("grpc_stream_duration"),
        "grpc_first_message_ms": values("grpc_first_message"),
        "checks": values("checks"),
    }


if __name__ == "__main__":
    main()
