"""docs/performance.md has the figures of the result file that it names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8").splitlines()


def tables() -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location("gpu_tables", ROOT / "benchmarks/gpu/tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = json.loads((ROOT / "benchmarks/results/gpu_kernels.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, list[str]] = module.tables(rows)
    return found


@pytest.mark.parametrize("name", tables())
def test_a_table_of_the_kernels_is_what_was_measured(name: str) -> None:
    lines = tables()[name]
    assert len(lines) > 2
    starts = [place for place, line in enumerate(PAGE) if line == lines[0]]
    assert any(PAGE[start : start + len(lines)] == lines for start in starts), (
        f"{name}: write the table that benchmarks/gpu/tables.py prints into docs/performance.md"
    )
