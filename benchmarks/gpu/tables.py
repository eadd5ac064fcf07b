"""The tables of docs/performance.md that come from gpu_kernels.json, as Markdown:

PYTHONPATH=benchmarks/gpu python benchmarks/gpu/tables.py benchmarks/results/gpu_kernels.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FP8 = "grouped_mlp_fp8, rows in {}"
TORCH_PREFILL = "varlen_attn of torch, contiguous"


def tables(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Each table's lines, by its name."""
    found = {
        "grouped MLP, 128 experts": _mlp(rows, 128),
        "grouped MLP, 32 experts": _mlp(rows, 32),
        "grouped MLP, float8": _fp8(rows),
        "paged decode": _decode(rows),
        "paged prefill": _prefill(rows),
        "small kernels": _small(rows),
        "sampler": _sampler(rows),
    }
    if _of(rows, "dense_layer"):  # the oldest results have none
        found["dense part of a layer"] = _dense(rows)
    return found


def _lines(head: str, body: Sequence[Sequence[str]]) -> list[str]:
    return [head, "|---" * (head.count("|") - 1) + "|", *(f"| {' | '.join(cells)} |" for cells in body)]


def _of(rows: Sequence[Row], kernel: str, **where: Any) -> list[Row]:
    return [row for row in rows if row["kernel"] == kernel and all(row[key] == value for key, value in where.items())]


def _one(rows: Sequence[Row], kernel: str, **where: Any) -> Row:
    (found,) = _of(rows, kernel, **where)
    return found


def _us(value: float) -> str:
    return f"{value:,.0f}"


def _floor(row: Row, show: Callable[[float], str] = _us) -> str:
    return f"{show(row['floor_us'])} ({row['bound']})"


def _mlp(rows: Sequence[Row], experts: int) -> list[str]:
    body = []
    for row in _of(rows, "grouped_mlp", experts=experts):
        other = _one(rows, "grouped_mm of torch", experts=experts, tokens=row["tokens"])
        moved, computed = f"{row['bytes'] / 1e6:,.0f}", f"{row['operations'] / 1e9:,.0f}"
        body.append([str(row["tokens"]), f"{row['active_experts']:g}", moved, computed, _floor(row),
                     _us(row["measured_us"]), f"{row['fraction']:.2f}", _us(other["measured_us"])])  # fmt: skip
    return _lines(
        "| tokens | active experts | must move, MB | must compute, GFLOP | floor, µs | measured, µs | floor / measured "
        "| torch's grouped_mm, µs |",
        body,
    )


def _fp8(rows: Sequence[Row]) -> list[str]:
    body = []
    for wide in _of(rows, FP8.format("bfloat16")):
        narrow = _one(rows, FP8.format("float8"), experts=wide["experts"], tokens=wide["tokens"])
        cells = [str(wide["experts"]), str(wide["tokens"]), f"{wide['bytes'] / 1e6:,.0f}"]
        for row in (wide, narrow):
            cells += [_floor(row), _us(row["measured_us"]), f"{row['fraction']:.2f}"]
        body.append([*cells, _us(wide["bfloat16_us"])])
    return _lines(
        "| experts | tokens | must move, MB | floor, rows bfloat16, µs | measured | floor / measured "
        "| floor, rows float8, µs | measured | floor / measured | weights in bfloat16, µs |",
        body,
    )


def _decode(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in _of(rows, "paged_decode", lengths="equal", block="position, head"):
        where = {"batch": row["batch"], "context": row["context"], "block": row["block"], "lengths": "±25 %"}
        uneven = [[f"{r['measured_us']:.1f}", f"{r['fraction']:.2f}"] for r in _of(rows, "paged_decode", **where)]
        cells = [f"{row['batch']} × {row['context']:,}", f"{row['bytes'] / 1e6:,.1f}", f"{row['floor_us']:.1f}"]
        cells += [f"{row['measured_us']:.1f}", f"{row['fraction']:.2f}"]
        body.append(cells + (uneven[0] if uneven else ["–", "–"]))
    return _lines(
        "| batch × context | must move, MB | floor, µs | measured, µs | floor / measured | lengths ±25 %: measured, µs "
        "| floor / measured |",
        body,
    )


def _prefill(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in _of(rows, "paged_prefill"):
        where = {"sequences": row["sequences"], "tokens": row["tokens"], "prefix": row["prefix"]}
        other = _one(rows, TORCH_PREFILL, **where)
        moved, computed = f"{row['bytes'] / 1e6:,.1f}", f"{row['operations'] / 1e9:,.1f}"
        body.append([f"{row['sequences']} × {row['tokens']:,}", f"{row['prefix']:,}", moved, computed,
                     _floor(row, lambda value: f"{value:,.1f}"), f"{row['measured_us']:,.1f}",
                     f"{row['fraction']:.2f}", _us(other["measured_us"])])  # fmt: skip
    return _lines(
        "| chunks × tokens | cached before | must move, MB | must compute, GFLOP | floor, µs | measured, µs "
        "| floor / measured | torch's varlen_attn, µs |",
        body,
    )


def _small(rows: Sequence[Row]) -> list[str]:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "add + RMS norm, hidden size 2048": ("add_rms_norm", {"hidden": 2048}),
        "add + RMS norm, hidden size 7168": ("add_rms_norm", {"hidden": 7168}),
        "QK-norm + rotary + KV append": ("rope_append", {}),
        "gate, softmax, 8 of 128 experts": ("route", {"scoring": "softmax", "replicas": 1}),
        "the same, two replicas of each expert on 8 ranks": ("route", {"scoring": "softmax", "replicas": 2}),
        "gate, sigmoid in groups, 8 of 256, two replicas on 32 ranks": ("route", {"scoring": "sigmoid"}),
    }
    body = [[name, *map(_with_floor, _of(rows, kernel, **where))] for name, (kernel, where) in kinds.items()]
    return _lines("| | 1 token | 64 | 256 | 4096 |", body)


def _sampler(rows: Sequence[Row]) -> list[str]:
    body = [
        [f"sampler, {dtype} logits, vocabulary of 151,936", *map(_with_floor, _of(rows, "gumbel_argmax", logits=dtype))]
        for dtype in ("float32", "bfloat16")
    ]
    return _lines("| | 1 sequence | 64 | 256 |", body)


def _dense(rows: Sequence[Row]) -> list[str]:
    ways = {"parts": "products of `few_rows`", "library": "torch's products"}
    body = [[name, *map(_with_floor, _of(rows, "dense_layer", products=way))] for way, name in ways.items()]
    return _lines("| | 1 token | 8 | 32 | 64 | 128 |", body)


def _with_floor(row: Row) -> str:
    return f"{row['measured_us']:.1f} ({row['floor_us']:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    found = tables(json.loads(parser.parse_args().results.read_text(encoding="utf-8"))["rows"])
    for name, lines in found.items():
        print("\n".join([f"{name}:", *lines, ""]))


if __name__ == "__main__":
    main()
