"""k6 streams through both doors of a mesh at once; the same script loads it in benchmarks/load.py."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.live_mesh import LiveMesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
STREAMS, ITERATIONS, MAX_TOKENS = 4, 2, 12


def run(k6: str, settings: dict[str, str]) -> None:
    result = subprocess.run(
        [k6, "run", "--quiet", "--no-color", str(ROOT / "tests/foreign/load.js")],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


async def test_k6(live: LiveMesh, tmp_path: Path) -> None:
    k6 = shutil.which("k6", path=str(Path(sys.executable).parent))
    assert k6 is not None, "k6 is in the extra `dev`"
    summary = tmp_path / "summary.json"
    settings = {
        "EXPERTMESH_HTTP": live.http,
        "EXPERTMESH_ROUTER": live.router,
        "HTTP_STREAMS": STREAMS,
        "GRPC_STREAMS": STREAMS,
        "ITERATIONS": ITERATIONS,
        "MAX_TOKENS": MAX_TOKENS,
        "PROTO": ROOT / "proto",
        "SUMMARY": summary,
        "K6_NO_USAGE_REPORT": "true",
    }
    await asyncio.to_thread(run, k6, {name: str(value) for name, value in settings.items()})
    figures = json.loads(summary.read_text(encoding="utf-8"))
    assert figures["failed_thresholds"] == []
    counts = {name: metric["values"].get("count") for name, metric in figures["metrics"].items()}
    assert counts["tokens"] == 2 * STREAMS * ITERATIONS * MAX_TOKENS
    checks = figures["metrics"]["checks"]["values"]
    assert (checks["passes"], checks["fails"]) == (2 * STREAMS * ITERATIONS * 3 + ITERATIONS, 0)
