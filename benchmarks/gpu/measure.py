"""What the GPU benchmarks share: timing in CUDA graphs, the machine's ceilings, and what a result file says."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

Row = dict[str, Any]

_READ_BYTES = 4 << 30
_MATMUL_SIZE = 8192


Call = Callable[[], object]


def time_graph(calls: Sequence[Call], *, budget_ms: float = 12.0, rounds: int = 5) -> float:
    """Median time of one call in µs.

    The calls run one after another in one CUDA graph, so that no launch waits for the host; they should work on so
    much memory together that none finds its input in the cache. A round replays the graph for ``budget_ms`` and is
    timed with device events; the median is over rounds.
    """
    return time_graphs({"": calls}, budget_ms=budget_ms, rounds=rounds)[""]


def time_graphs(
    alternatives: dict[str, Sequence[Call]], *, budget_ms: float = 12.0, rounds: int = 5
) -> dict[str, float]:
    """``time_graph`` of each, round by round in turns, so that all see the same clocks and temperatures."""
    graphs = {name: _capture(calls) for name, calls in alternatives.items()}
    replays = {name: max(2, round(budget_ms / max(_replay(graph, 2) / 2, 1e-3))) for name, graph in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            elapsed_ms = _replay(graph, replays[name])
            times[name].append(elapsed_ms * 1e3 / (replays[name] * len(alternatives[name])))
    return {name: statistics.median(found) for name, found in times.items()}


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def _replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Milliseconds of so many replays."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class _CompileOnly:
    """Stands for a kernel: compiles it for the arguments of a launch and does not launch."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda *args, **kwargs: self._kernel.warmup(*args, grid=grid, **kwargs)


@contextmanager
def compile_only(module: object, name: str) -> Iterator[None]:
    """Launches of a module's kernel only compile it, into Triton's cache on disk."""
    kernel = getattr(module, name)
    setattr(module, name, _CompileOnly(kernel))
    try:
        yield
    finally:
        setattr(module, name, kernel)


def _attempt(function: Callable[[Any], None], job: object) -> str:
    try:
        function(job)
    except Exception as error:  # noqa: BLE001  # a tile that does not fit is a result, not a failure
        return repr(error)[:200]
    return ""


def compile_all(function: Callable[[Any], None], jobs: Sequence[Any]) -> dict[Any, str]:
    """Run ``function`` on every job in processes of their own; what went wrong with each, '' = nothing."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(partial(_attempt, function), jobs, chunksize=2), strict=True))


@triton.jit
def _read_kernel(source, out, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    value = tl.load(source + pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + pid, tl.sum(value, 0))


def read_ceiling() -> float:
    """Bytes a second of reading float32 numbers and adding them up."""
    source = torch.randn(_READ_BYTES // 4, device="cuda")
    best = 0.0
    for block, warps in ((4096, 4), (8192, 8), (16384, 16)):
        out = torch.empty(source.numel() // block, device="cuda")

        def call(block: int = block, warps: int = warps, out: torch.Tensor = out) -> None:
            _read_kernel[(source.numel() // block,)](source, out, BLOCK=block, num_warps=warps)

        best = max(best, _READ_BYTES / time_graph([call]) * 1e6)
    return best


def matmul_ceiling() -> float:
    """Operations a second of a bfloat16 matrix product of the library, 8192³, random data."""
    a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _MATMUL_SIZE**3 / time_graph([lambda: torch.mm(a, b, out=out)], budget_ms=50) * 1e6


def fp8_matmul_ceiling() -> float:
    """The same of float8 numbers, with one scale a matrix."""
    a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    call = partial(torch._scaled_mm, a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * _MATMUL_SIZE**3 / time_graph([call], budget_ms=50) * 1e6


def ceilings() -> dict[str, float]:
    """All ceilings, in bytes and operations a second."""
    found = {"read": read_ceiling(), "bf16_matmul": matmul_ceiling(), "fp8_matmul": fp8_matmul_ceiling()}
    torch.cuda.empty_cache()
    return found


def row(
    kernel: str,
    shape: Row,
    microseconds: float,
    *,
    num_bytes: float,
    operations: float,
    limits: dict[str, float],
    unit: str = "bf16_matmul",
) -> Row:
    """A result: the floor is the larger of both times at the machine's ceilings, operations at that of ``unit``;
    ``fraction`` = floor / measured."""
    bytes_us, operations_us = num_bytes / limits["read"] * 1e6, operations / limits[unit] * 1e6
    floor = max(bytes_us, operations_us)
    return {
        "kernel": kernel,
        **shape,
        "bytes": round(num_bytes),
        "operations": round(operations),
        "bound": "bytes" if bytes_us >= operations_us else "operations",
        "floor_us": round(floor, 2),
        "measured_us": round(microseconds, 2),
        "fraction": round(floor / microseconds, 3),
    }


def machine() -> Row:
    """Device and versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def command(out: Path) -> str:
    """What was typed, every option of it; ``out`` without its folder, which is nobody else's."""
    given = [out.name if word == str(out) else word for word in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/gpu/{Path(sys.argv[0]).name}", *given])


def write(path: Path, limits: dict[str, float], rows: Sequence[Row]) -> None:
    """With the command that is running. One line a row, so that results can be compared line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({"command": command(path), **machine(), "ceilings": limits}, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(line, ensure_ascii=False) for line in rows)
    path.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')


def show(rows: Sequence[Row]) -> None:
    """One line a row, for the end of a log."""
    for line in rows:
        print(
            " ".join(f"{key}={value}" for key, value in line.items() if key not in ("bytes", "operations", "floor_us"))
        )
