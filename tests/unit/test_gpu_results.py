"""What the benchmarks on GPUs note beside their figures, as far as it needs no GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

MEASURE = Path(__file__).parents[2] / "benchmarks/gpu/measure.py"


def test_a_result_says_the_whole_command_but_not_whose_folder_it_is_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("gpu_measure", MEASURE)
    assert spec is not None
    assert spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", [str(tmp_path / "serve_two.py"), "--migrate", "--out", str(out), "--kill"])
    assert measure.command(out) == "python benchmarks/gpu/serve_two.py --migrate --out found.json --kill"
