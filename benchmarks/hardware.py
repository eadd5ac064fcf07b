"""Measures the constants of a GPU that the simulator's cost model rests on.

    python benchmarks/hardware.py --out benchmarks/results/hardware.json

Needs one CUDA GPU. Medians of repeated runs, timed with CUDA events: reading memory, bf16 matrix products, and experts'
weights read by ``grouped_mm`` with few rows an expert, as in decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPEATS = 30


def seconds(work: Callable[[], Any]) -> float:
    """The median time of ``work`` on the device."""
    for _ in range(5):
        work()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_tb_per_s() -> float:
    """A reduction over 8 GB."""
    x = torch.ones(2**31, dtype=torch.float32, device="cuda")
    return x.nbytes / seconds(x.sum) / 1e12


def matmul_tflop_per_s(rows: int, inner: int, columns: int) -> float:
    a_RI = torch.randn(rows, inner, dtype=torch.bfloat16, device="cuda")
    b_IC = torch.randn(inner, columns, dtype=torch.bfloat16, device="cuda")
    return 2 * rows * inner * columns / seconds(lambda: a_RI @ b_IC) / 1e12


def grouped_read_tb_per_s(experts: int, hidden: int, width: int, rows: int) -> float:
    """Both products of an expert MLP, weights stored as in checkpoints (output rows first); ``rows`` tokens an expert.

    Weights alone count as bytes.
    """
    up_EHF = torch.randn(experts, 2 * width, hidden, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    down_EFH = torch.randn(experts, hidden, width, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    x_TH = torch.randn(experts * rows, hidden, dtype=torch.bfloat16, device="cuda")
    y_TF = torch.randn(experts * rows, width, dtype=torch.bfloat16, device="cuda")
    ends_E = torch.arange(rows, experts * rows + 1, rows, dtype=torch.int32, device="cuda")

    def work() -> None:
        torch.nn.functional.grouped_mm(x_TH, up_EHF, offs=ends_E)
        torch.nn.functional.grouped_mm(y_TF, down_EFH, offs=ends_E)

    return (up_EHF.nbytes + down_EFH.nbytes) / seconds(work) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "memory_read_tb_per_s": read_tb_per_s(),
        "matmul_tflop_per_s": {
            "8192 x 8192 x 8192": matmul_tflop_per_s(8192, 8192, 8192),
            "4096 x 7168 x 4096": matmul_tflop_per_s(4096, 7168, 4096),
            "2048 x 7168 x 18432": matmul_tflop_per_s(2048, 7168, 18432),
        },
        "grouped_mm_read_tb_per_s": {
            f"{experts} experts, hidden {hidden}, width {width}, {rows} rows": grouped_read_tb_per_s(
                experts, hidden, width, rows
            )
            for experts, hidden, width in ((9, 7168, 2048), (64, 2048, 768), (32, 2880, 2880))
            for rows in (8, 64)
        },
    }
    text = json.dumps(report, indent=2)
    print(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
