"""All kernels on one GPU, with torch and Triton alone:

    PYTHONPATH=src:benchmarks/gpu python benchmarks/gpu/kernels.py --out benchmarks/results/gpu_kernels.json

``--sweep`` times tile sizes and other tuning instead and writes every trial.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import few_rows
import grouped_mlp
import grouped_mlp_fp8
import measure
import paged_decode
import paged_prefill
import step_kernels
from measure import Row

Part = Callable[[dict[str, float]], Iterator[Row]]

MEASURED: dict[str, Part] = {
    "grouped_mlp": lambda limits: grouped_mlp.measure(grouped_mlp.SHAPES, limits),
    "grouped_mlp_fp8": grouped_mlp_fp8.measure,
    "paged_decode": paged_decode.measure,
    "paged_prefill": paged_prefill.measure,
    "step_kernels": step_kernels.measure,
    "few_rows": few_rows.measure,
}
SWEPT: dict[str, Part] = {
    "paged_prefill": paged_prefill.sweep,
    "paged_decode": paged_decode.sweep,
    "grouped_mlp": grouped_mlp.sweep,
    "grouped_mlp_fp8": grouped_mlp_fp8.sweep,
    "few_rows": few_rows.sweep,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--sweep", action="store_true", help="tune instead of measuring")
    parser.add_argument("--only", choices=sorted(MEASURED), action="append", help="this part alone; may be repeated")
    arguments = parser.parse_args()
    parts = SWEPT if arguments.sweep else MEASURED
    limits, rows, failed = measure.ceilings(), list[Row](), False
    print({name: f"{value:.4g}" for name, value in limits.items()}, flush=True)
    for name in arguments.only or parts:
        if name not in parts:
            continue
        began = time.monotonic()
        try:
            for result in parts[name](limits):
                rows.append(result)
                if not arguments.sweep:
                    measure.show([result])
        except Exception:  # noqa: BLE001  # one part that fails must not lose what the others measured
            traceback.print_exc()
            failed = True
        measure.write(arguments.out, limits, rows)
        print(f"{name}: {time.monotonic() - began:.0f} s, {len(rows)} rows", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
