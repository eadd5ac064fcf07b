"""``expertmesh bench``: the numbers of the README, each with the command that makes it."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import grpc
import psutil
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli.addresses import checked_address
from expertmesh.cli.connection import door_tls, key_for
from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir, write_atomically
from expertmesh.cli.up import with_overrides
from expertmesh.mesh.client import GenerateClient, status_line
from expertmesh.mesh.config import MeshConfig, load_config
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import load_spec

if TYPE_CHECKING:
    from expertmesh.cli.bench_load import Measurement, Timed

app = typer.Typer(no_args_is_help=True, help="Measure serving, beside transformers.")

PACKAGES = ("expertmesh", "torch", "transformers", "grpcio", "numpy")
RESULT = Path("benchmarks/results/serve.json")
IDLE_WINDOW_S = 10.0
ROUNDS = 3
REQUESTS_PER_SLOT = 2
"""Requests of a round for each one that runs at a time."""

System = Callable[[Sequence[Sequence[int]], int], "Sequence[Timed]"]


@app.callback()
def _group() -> None:
    """Keeps ``serve`` a sub-command while it is the only one."""


@app.command()
def serve(
    concurrency: Annotated[str, typer.Option(help="Requests that run at a time, comma-separated.")] = "1,4,16,64",
    num_tokens: Annotated[int, typer.Option(min=2, help="Output tokens of each request.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Threads of transformers and of the colocated process.")] = 2,
    router: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Measure the mesh behind this router, and nothing else."),
    ] = None,
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="With --router: mesh.yaml whose api and tls sections connect; unset = no TLS."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Where the result goes; unset = {RESULT}, with --router nowhere.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result instead of a table.")] = False,
) -> None:
    """Output tokens/s, TTFT and TPOT of 2 attention and 3 expert servers, of one colocated process and of transformers.

    With --router those of a mesh that runs; EXPERTMESH_API_KEY or EXPERTMESH_API_KEY_FILE has the key that it asks for.
    """
    levels = _levels(concurrency)
    console = Console(stderr=True)
    if router is not None:
        systems, vocab_size = asyncio.run(_running_mesh(checked_address("--router", router), config_file, num_tokens))
        measured = [row for level in levels for row in _measure(systems, level, console, vocab_size)]
        _report(measured, {}, num_tokens, threads, out, console, as_json=as_json)
        return
    if config_file is not None:
        raise UserError(
            "--config", "is given without --router", "leave it out: meshes that are started here have their own"
        )
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers", "is not installed", "install expertmesh with its extra `dev`")
    vocab_size = load_spec(MeshConfig().model).vocab_size
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as folder, ExitStack() as stack:
        meshes = {name: LocalMesh(config, StateDir.claim(Path(folder) / name)) for name, config in _meshes(threads)}
        for name, mesh in meshes.items():
            console.print(f"starting {name}")
            stack.enter_context(mesh)
        console.print("loading transformers")
        systems = _systems(meshes, threads, num_tokens)
        measured = [row for level in levels for row in _measure(systems, level, console, vocab_size)]
        console.print(f"measuring {IDLE_WINDOW_S:.0f} s of idleness")
        idle_percent = {name: _cpu_percent(mesh) for name, mesh in meshes.items()}
    _report(measured, idle_percent, num_tokens, threads, out or RESULT, console, as_json=as_json)


async def _running_mesh(address: str, config_file: Path | None, num_tokens: int) -> tuple[dict[str, System], int]:
    """The one system behind a router, and the size of its vocabulary."""
    from expertmesh.cli.bench_load import load_router

    config = load_config(config_file)
    tls = door_tls(config)
    key = key_for(address, tls, config.api)
    try:
        async with GenerateClient(address, tls, key) as client:
            info = await client.model_info()
    except grpc.aio.AioRpcError as error:
        typer.echo(f"error: the router at {address} answered {status_line(error)}", err=True)
        raise typer.Exit(1) from None

    def ask(prompts: Sequence[Sequence[int]], level: int) -> Sequence[Timed]:
        return asyncio.run(
            load_router(address, prompts, concurrency=level, num_tokens=num_tokens, tls=tls, api_key=key)
        )

    return {f"mesh at {address}": ask}, info.vocab_size


def _report(
    measured: Sequence[Measurement],
    idle_percent: Mapping[str, float],
    num_tokens: int,
    threads: int,
    out: Path | None,
    console: Console,
    *,
    as_json: bool,
) -> None:
    result = _result(measured, idle_percent, num_tokens, threads)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(result, indent=1) + "\n")
        console.print(f"wrote {out}")
    if as_json:
        typer.echo(json.dumps(result))
    else:
        Console().print(_table(measured, idle_percent))


def _levels(text: str) -> list[int]:
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 1:
        raise UserError("--concurrency", f"{text!r} is not a list of positive numbers", "write 1,4,16,64")
    return levels


def _meshes(threads: int) -> list[tuple[str, MeshConfig]]:
    colocated = {"both_servers": 1, "attention.servers": 0, "expert.servers": 0, "attention.num_threads": threads}
    return [
        ("mesh 2x3", with_overrides(MeshConfig(), {"attention.servers": 2, "expert.servers": 3})),
        ("one both process", with_overrides(MeshConfig(), colocated)),
    ]


def _systems(meshes: Mapping[str, LocalMesh], threads: int, num_tokens: int) -> dict[str, System]:
    from expertmesh.cli.bench_load import TransformersBaseline, load_router

    baseline = TransformersBaseline(load_spec(MeshConfig().model).path, threads)

    def ask(router: str) -> System:
        return lambda prompts, level: asyncio.run(
            load_router(router, prompts, concurrency=level, num_tokens=num_tokens)
        )

    systems: dict[str, System] = {name: ask(mesh.router) for name, mesh in meshes.items()}
    systems["transformers"] = lambda prompts, level: baseline.load(prompts, concurrency=level, num_tokens=num_tokens)
    return systems


def _measure(systems: Mapping[str, System], level: int, console: Console, vocab_size: int) -> list[Measurement]:
    """Rounds alternate between the systems, so that a machine that changes its speed is the same for all."""
    from expertmesh.cli.bench_load import summarise

    rounds: dict[str, list[Sequence[Timed]]] = {name: [] for name in systems}
    prompts = _prompts(1 + ROUNDS, max(4, REQUESTS_PER_SLOT * level), vocab_size)
    for index, batch in enumerate(prompts):
        for name, system in systems.items():
            console.print(f"concurrency {level}: {name}, {'warm-up' if index == 0 else f'round {index}'}")
            timed = system(batch, level)
            if index > 0:
                rounds[name].append(timed)
    return [summarise(name, level, timed) for name, timed in rounds.items()]


def _prompts(num_rounds: int, num_requests: int, vocab_size: int) -> list[list[list[int]]]:
    """Distinct prompts of 8 to 40 random tokens: no request finds another's prefix in a cache."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [
        [rng.integers(2, vocab_size, size=rng.integers(8, 41)).tolist() for _ in range(num_requests)]
        for _ in range(num_rounds)
    ]


def _cpu_percent(mesh: LocalMesh) -> float:
    """CPU time of all processes of the mesh in an idle window, in percent of one core."""
    processes = [psutil.Process(server.pid) for server in mesh.servers.values() if server.pid is not None]
    before_s = sum(_cpu_s(process) for process in processes)
    time.sleep(IDLE_WINDOW_S)
    return 100 * (sum(_cpu_s(process) for process in processes) - before_s) / IDLE_WINDOW_S


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _result(
    measured: Sequence[Measurement], idle_percent: Mapping[str, float], num_tokens: int, threads: int
) -> dict[str, Any]:
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.system()},
        "settings": {"output_tokens": num_tokens, "threads": threads, "dtype": "float32", "rounds": ROUNDS},
        "idle_cpu_percent_of_a_core": {name: round(percent, 2) for name, percent in idle_percent.items()},
        "results": [_rounded(dataclasses.asdict(row)) for row in measured],
    }


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table(measured: Sequence[Measurement], idle_percent: Mapping[str, float]) -> Table:
    idle = ", ".join(f"{name} {percent:.1f} %" for name, percent in idle_percent.items())
    table = Table(caption=f"idle, in percent of one core: {idle}" if idle else None)
    for name in ("concurrency", "system", "tokens/s", "TTFT ms p50", "p99", "TPOT ms p50", "p99"):
        table.add_column(name, justify="left" if name == "system" else "right")
    for row in measured:
        latencies = (row.ttft_ms_p50, row.ttft_ms_p99, row.tpot_ms_p50, row.tpot_ms_p99)
        cells = [f"{latency:.1f}" for latency in latencies]
        table.add_row(str(row.concurrency), row.system, f"{row.output_tokens_per_s:.0f}", *cells)
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "run from source"
