"""docs/performance.md has the figures of the result file that it names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()


def tables(results: str = "gpu_kernels") -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location("gpu_tables", ROOT / "benchmarks/gpu/tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, list[str]] = module.tables(rows)
    return found


NAMES = [*(("gpu_kernels", name) for name in tables()), ("gpu_kernels_overlap", "dense part of a layer")]


@pytest.mark.parametrize(("results", "name"), NAMES)
def test_a_table_of_the_kernels_is_what_was_measured(results: str, name: str) -> None:
    lines = tables(results)[name]
    assert len(lines) > 2
    starts = [place for place, line in enumerate(PAGE) if line == lines[0]]
    assert any(PAGE[start : start + len(lines)] == lines for start in starts), (
        f"{name}: write the table that benchmarks/gpu/tables.py prints into docs/performance.md"
    )
