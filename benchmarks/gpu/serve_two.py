"""Serving on two GPUs: `expertmesh up` on random weights of Qwen3-30B-A3B's shape, through router and gRPC.

    PYTHONPATH=src:tests:benchmarks/gpu python benchmarks/gpu/serve_two.py --out benchmarks/results/gpu_serve_two.json

Every number of requests is sent at once, 128 random tokens in, 128 out, greedy, streamed, by clients in processes of
their own. ``cpu`` is the CPU time of each process over the run, in percent of a core: what holds the GPUs up.

``--routers N``: several routers at one address. The kernel gives each connection to one of them by a hash, so clients
then have more than one (``--connections``); how evenly they fell is seen in what each router took of a core.

``--migrate``: all layers swap experts between the two ranks while requests decode, compared with the same load before
and after; ``--migration-tokens-out`` makes these loads as long as it takes. ``came`` says how their weights did, to
both ranks together: bytes, MB/s over the time of all migrations (``--migration-bytes-per-s`` bounds what each rank
gives), and MB/s of one expert, from its first byte to its last.
``--kill``: one rank is killed with SIGKILL while requests decode; seconds until it and the others serve again, and
whether every request ended with all of its tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import measure
import numpy as np
import psutil
from decode import QWEN3_30B_A3B
from decode_two import MAX_BATCHED_TOKENS

from expertmesh.cli.bench_load import Timed, load_router
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.cli.up import with_overrides
from expertmesh.mesh import rpc
from expertmesh.mesh.config import MeshConfig, TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import admin_pb2, admin_pb2_grpc
from support import mesh_state

VLLM_MS = {64: 10.8, 256: 14.4, 512: 18.2}
"""vLLM 0.26.0's best mode on two H200s, offline; served over HTTP it took 13.0, 16.3 and 21.5."""
START_TIMEOUT_S = 300.0
CLIENTS = 8
MIGRATION_TIMEOUT_S = 12.0
WHILE = "while experts migrate"
SWAPS = 4
"""Experts of a layer that each rank gives the other."""
Came = dict[str, tuple[float, float]]
"""By transport: bytes, and seconds of the experts one by one."""


def mesh_config(folder: Path, roles: str, backend: str, layers: int, routers: int, **migration: object) -> MeshConfig:
    """``migration``: keys of ``balancer`` that begin with this word."""
    for name in ("tokenizer.json", "tokenizer_config.json"):  # text is detokenised, as far as it has the ids
        shutil.copy(demo_model_path() / name, folder / name)
    (folder / "config.json").write_text(json.dumps({**QWEN3_30B_A3B, "num_hidden_layers": layers}))
    experts = sum(role in "eb" for role in roles)
    return with_overrides(
        MeshConfig(),
        {
            "device": "cuda",
            "router.servers": routers,
            "both_servers": roles.count("b"),
            "attention.servers": roles.count("a"),
            "expert.servers": roles.count("e"),
            "expert.slots_per_server": QWEN3_30B_A3B["num_experts"] // experts,
            "model.path": folder,
            "model.dtype": "bfloat16",
            "model.load_format": "dummy",
            "model.max_model_len": 4096,
            "attention.max_num_seqs": 512 // sum(role in "ab" for role in roles),
            "attention.max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "attention.enable_prefix_caching": False,
            "dataplane.backend": backend,
            "dataplane.max_num_tokens": MAX_BATCHED_TOKENS,
            "balancer.formation_timeout_s": START_TIMEOUT_S,
            "balancer.view_timeout_s": START_TIMEOUT_S,
            "telemetry.trace_sample_ratio": 0.0,
            "telemetry.metrics_port": 0,
            **{f"balancer.migration_{key}": value for key, value in migration.items() if value is not None},
        },
    )


def ask(router: str, connections: int, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Timed]:
    """One client: all of its prompts at once."""
    load = load_router(
        router, prompts, concurrency=len(prompts), num_tokens=num_tokens, connections=min(connections, len(prompts))
    )
    return asyncio.run(load)


class Clients:
    """Processes, so that what is measured is not the client."""

    def __init__(self, router: str, connections: int) -> None:
        self._pool = ProcessPoolExecutor(CLIENTS, mp_context=get_context("spawn"))
        self._router = router
        self._connections = connections
        self._seed = 0

    def begin(self, requests: int, tokens_in: int, tokens_out: int) -> list[Future[list[Timed]]]:
        self._seed += 1
        drawn = np.random.default_rng(self._seed).integers(0, QWEN3_30B_A3B["vocab_size"], (requests, tokens_in))
        parts = [part.tolist() for part in np.array_split(drawn, min(CLIENTS, requests))]
        return [self._pool.submit(ask, self._router, self._connections, part, tokens_out) for part in parts]

    def run(self, requests: int, tokens_in: int, tokens_out: int) -> list[Timed]:
        return [timed for part in self.begin(requests, tokens_in, tokens_out) for timed in part.result()]

    def close(self) -> None:
        self._pool.shutdown()


def cpu_s(mesh: LocalMesh) -> dict[str, float]:
    times = {server.id: psutil.Process(server.pid).cpu_times() for server in mesh.servers.values() if server.pid}
    return {name: time.user + time.system for name, time in times.items()}


def summary(timed: Sequence[Timed]) -> dict[str, Any]:
    started = min(request.sent_s for request in timed)
    ended = max(request.token_times_s[-1] for request in timed)
    tokens = sum(len(request.token_times_s) for request in timed)
    return {
        "requests": len(timed),
        "ms_per_token": round(statistics.median(request.tpot_ms for request in timed), 3),
        "output_tokens_per_s": round(tokens / (ended - started)),
        "ttft_ms": round(statistics.median(request.ttft_ms for request in timed), 1),
    }


def measure_load(mesh: LocalMesh, clients: Clients, requests: int, tokens_in: int, tokens_out: int) -> dict[str, Any]:
    clients.run(requests, tokens_in, 4)
    before, began = cpu_s(mesh), time.perf_counter()
    timed = clients.run(requests, tokens_in, tokens_out)
    seconds, after = time.perf_counter() - began, cpu_s(mesh)
    assert all(len(request.token_times_s) == tokens_out for request in timed)
    percent = {name: round(100 * (after[name] - before[name]) / seconds) for name in before}
    return {**summary(timed), "vllm_ms_per_token": VLLM_MS.get(requests), "cpu_percent": percent}


def measure_migration(mesh: LocalMesh, clients: Clients, requests: int, tokens_out: int) -> list[dict[str, Any]]:
    """The same load before, during and after migrations of every layer, twice."""
    clients.run(requests, 128, 64)
    rows, captures = [], num_captures(mesh)
    for phase in ("before", WHILE, "between", WHILE, "after"):
        before = weights_that_came(mesh)
        parts = clients.begin(requests, 128, tokens_out)
        if phase == WHILE:
            layers, seconds = asyncio.run(swap_experts(mesh.balancer))
        timed = [request for part in parts for request in part.result()]
        asyncio.run(migrations_end(mesh.balancer))
        rows.append({"load": phase, "tokens_out": tokens_out, **summary(timed)})
        if phase == WHILE:
            came = came_since(mesh, before, seconds)
            rows[-1] |= {"layers_migrated": layers, "migration_s": round(seconds, 2), "came": came}
    rows[-1]["captures_meanwhile"] = num_captures(mesh) - captures
    for figure in ("ms_per_token", "output_tokens_per_s"):
        during, apart = ([row[figure] for row in rows if (row["load"] == WHILE) == wanted] for wanted in (True, False))
        rows[-1][f"{figure}_meanwhile"] = round(statistics.mean(during) / statistics.mean(apart), 4)
    return rows


def came_since(mesh: LocalMesh, before: Came, seconds: float) -> dict[str, dict[str, int]]:
    """By transport, the weights that have come since then to all ranks."""
    rows = {}
    for way, (num_bytes, each_s) in weights_that_came(mesh).items():
        bytes_before, each_before_s = before.get(way, (0.0, 0.0))
        size = num_bytes - bytes_before
        each_mb_per_s = size / 1e6 / (each_s - each_before_s)
        rows[way] = {
            "bytes": round(size),
            "mb_per_s": round(size / 1e6 / seconds),
            "expert_mb_per_s": round(each_mb_per_s),
        }
    return rows


def weights_that_came(mesh: LocalMesh) -> Came:
    return mesh_state.weights_that_came(mesh, mesh_state.rank_ids(mesh, ("both", "expert")))


def num_captures(mesh: LocalMesh) -> int:
    """How often a rank has captured its graphs."""
    return sum("CUDA graphs in" in line for log in mesh.state_dir.glob("*.log") for line in _lines(log))


async def migrations_end(balancer: str) -> None:
    """Wait until none is under way."""
    async with rpc.open_channel(balancer, TlsConfig()) as channel, asyncio.timeout(MIGRATION_TIMEOUT_S):
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        while True:
            status = await admin.GetStatus(admin_pb2.GetStatusRequest())
            if not status.migrations and not status.layers_to_apply:
                return
            await asyncio.sleep(0.05)


async def swap_experts(balancer: str) -> tuple[int, float]:
    """Every layer's first experts change ranks; the layers migrated, and the seconds until all had switched."""
    async with rpc.open_channel(balancer, TlsConfig()) as channel:
        admin = admin_pb2_grpc.AdminServiceStub(channel)
        found = await admin.GetPlacement(admin_pb2.GetPlacementRequest())
        request = admin_pb2.ApplyRequest(view_number=found.view_number)
        for layer in found.layers:
            slots = list(layer.slots)
            half = len(slots) // 2
            slots[:SWAPS], slots[half : half + SWAPS] = slots[half : half + SWAPS], slots[:SWAPS]
            request.layers.add(layer=layer.layer, version=layer.version, slots=slots)
        began = time.perf_counter()
        accepted = await admin.Apply(request)
        wanted = {layer.layer: layer.version for layer in accepted.accepted}
        while True:
            now = await admin.GetPlacement(admin_pb2.GetPlacementRequest())
            switched = sum(layer.version >= wanted[layer.layer] for layer in now.layers if layer.layer in wanted)
            seconds = time.perf_counter() - began
            if switched == len(wanted) or seconds > MIGRATION_TIMEOUT_S:
                return switched, seconds
            await asyncio.sleep(0.05)


def measure_kill(mesh: LocalMesh, clients: Clients, requests: int, tokens_out: int) -> dict[str, Any]:
    """One rank is killed in the middle of decoding."""
    victim = next(server for server in mesh.servers.values() if server.role in ("both", "expert"))
    starts = {server.id: server.starts for server in mesh.servers.values()}
    parts = clients.begin(requests, 128, tokens_out)
    threading.Event().wait(3.0)  # all requests decode by then
    killed_at = time.perf_counter()
    mesh.kill(victim.id, signal.SIGKILL)
    timed = [request for part in parts for request in part.result()]
    arrivals = np.sort(np.concatenate([request.token_times_s for request in timed]))
    behind = int(np.searchsorted(arrivals, killed_at))
    gaps = np.diff(arrivals[max(0, behind - 1) :])
    pause = int(gaps.argmax())
    return {
        "killed": victim.id,
        "requests": requests,
        "whole": sum(len(request.token_times_s) == tokens_out for request in timed),
        "tokens_before_the_kill": behind,
        "longest_pause_s": round(float(gaps.max()), 2),
        "tokens_again_after_s": round(float(arrivals[max(0, behind - 1) + pause + 1] - killed_at), 2),
        "started_again": [server.id for server in mesh.servers.values() if server.starts > starts[server.id]],
        "log": [line for log in sorted(mesh.state_dir.glob("*.log")) for line in _lines(log) if _tells(line)][-40:],
    }


def _lines(log: Path) -> list[str]:
    return [f"{log.stem}: {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]


def _tells(line: str) -> bool:
    return any(word in line for word in ("broke", "exits with", "in view", "captured", "serves", "lost", "loaded"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--layout", default="bb:deepep", help="roles by rank:plane")
    parser.add_argument("--requests", type=int, nargs="*", default=list(VLLM_MS))
    parser.add_argument("--tokens-in", type=int, default=128)
    parser.add_argument("--tokens-out", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--connections", type=int, help="of each client; unset = 1, and 8 to several routers")
    parser.add_argument("--migrate", action="store_true")
    parser.add_argument("--migration-tokens-out", type=int, default=1024, help="of each request of the three loads")
    parser.add_argument("--migration-bytes-per-s", type=int, help="balancer.migration_bytes_per_s")
    parser.add_argument("--migration-transport", choices=("auto", "tcp", "nixl"), help="balancer.migration_transport")
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    roles, _, backend = arguments.layout.partition(":")
    routers, connections = arguments.routers, arguments.connections or (1 if arguments.routers == 1 else 8)
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append({"layout": arguments.layout, "routers": routers, "connections": CLIENTS * connections, **row})
        print(json.dumps(rows[-1]), flush=True)
        measure.write(arguments.out, {}, rows)

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        model.mkdir()
        limits = {"bytes_per_s": arguments.migration_bytes_per_s, "transport": arguments.migration_transport}
        config = mesh_config(model, roles, backend, arguments.layers, routers, **limits)
        mesh = LocalMesh(
            config, StateDir.claim(Path(folder) / "state"), on_event=lambda event: print(event, flush=True)
        )
        try:
            began = time.perf_counter()
            mesh.start()
            mesh.wait_ready(START_TIMEOUT_S)
            print(f"the mesh serves after {time.perf_counter() - began:.1f} s", flush=True)
            clients = Clients(mesh.router, connections)
            for requests in arguments.requests:
                note(measure_load(mesh, clients, requests, arguments.tokens_in, arguments.tokens_out))
            if arguments.migrate:
                for row in measure_migration(mesh, clients, 64, arguments.migration_tokens_out):
                    note(row)
                log_lines = [line for log in mesh.state_dir.glob("*.log") for line in _lines(log) if "igration" in line]
                print("\n".join(log_lines[:6] + log_lines[-6:]), flush=True)
            if arguments.kill:
                note(measure_kill(mesh, clients, 64, 512))
            clients.close()
        except BaseException:
            for log in sorted(mesh.state_dir.glob("*.log")):
                print("\n".join([f"--- {log.name}", *_lines(log)[-40:]]), flush=True)
            raise
        finally:
            mesh.stop()


if __name__ == "__main__":
    main()
