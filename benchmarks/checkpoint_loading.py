"""Reading weights: ``TensorReader``'s direct reads beside safetensors' memory map.

    python benchmarks/checkpoint_loading.py [--gigabytes G] [--folder DIR] [--json FILE]

A file of bfloat16 matrices of 4 MiB is copied into memory, kept or converted to float32, by one thread and by four,
from the page cache and from the disk after the kernel was asked to forget the file. CPU seconds and wall seconds for
each GB of the file, the best of five rounds by each; the wall time is worth something only on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from expertmesh.mesh.model.reader import TensorReader
from expertmesh.mesh.model.tensors import SINGLE_FILE, read_tensor_index

SHAPE = (2048, 1024)
ROUNDS = 5

CopyAll = Callable[[list[torch.Tensor], int], None]


def write_file(folder: Path, gigabytes: float) -> int:
    """Returns the number of matrices."""
    count = max(1, round(gigabytes * 1e9 / (2 * SHAPE[0] * SHAPE[1])))
    save_file({str(i): torch.randn(SHAPE).to(torch.bfloat16) for i in range(count)}, folder / SINGLE_FILE)
    return count


def forget(folder: Path) -> None:
    """Drop the file from the page cache."""
    descriptor = os.open(folder / SINGLE_FILE, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def by_reads(folder: Path) -> CopyAll:
    entries = read_tensor_index(folder).entries

    def copy_all(outs: list[torch.Tensor], threads: int) -> None:
        reader = TensorReader(folder, lambda num_bytes: None)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: reader.copy(entries[str(i)], outs[i]), range(len(outs))))

    return copy_all


def by_map(folder: Path) -> CopyAll:
    def copy_all(outs: list[torch.Tensor], threads: int) -> None:
        mapped = safe_open(folder / SINGLE_FILE, framework="pt")
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda i: outs[i].copy_(mapped.get_tensor(str(i))), range(len(outs))))

    return copy_all


def measure(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    size_gb = (folder / SINGLE_FILE).stat().st_size / 1e9
    for dtype in (torch.bfloat16, torch.float32):
        outs = [torch.zeros(SHAPE, dtype=dtype) for _ in range(count)]
        for cold in (False, True):
            for threads in (1, 4):
                for name, copy_all in (("reads", by_reads(folder)), ("map", by_map(folder))):
                    cpu_s, wall_s = best(folder, copy_all, outs, threads, cold=cold)
                    yield {
                        "into": str(dtype).removeprefix("torch."),
                        "from": "disk" if cold else "cache",
                        "threads": threads,
                        "by": name,
                        "cpu_s_per_gb": round(cpu_s / size_gb, 3),
                        "wall_s_per_gb": round(wall_s / size_gb, 3),
                    }


def best(folder: Path, copy_all: CopyAll, outs: list[torch.Tensor], threads: int, *, cold: bool) -> tuple[float, float]:
    rounds = []
    for _ in range(ROUNDS):
        if cold:
            forget(folder)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        copy_all(outs, threads)
        rounds.append((time.process_time() - cpu_s, time.perf_counter() - wall_s))
    return min(cpu for cpu, _ in rounds), min(wall for _, wall in rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of the file")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; unset = the temporary folder")
    parser.add_argument("--json", type=Path, help="write the result to a file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for row in measure(Path(name), write_file(Path(name), arguments.gigabytes)):
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if arguments.json is not None:
        result = {
            "command": "python benchmarks/checkpoint_loading.py",
            "gigabytes": arguments.gigabytes,
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
