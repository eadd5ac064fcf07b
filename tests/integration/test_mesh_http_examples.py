"""The examples of docs/http-api.md do what the page says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from support.live_mesh import LiveMesh

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/http-api.md"
TIMEOUT_S = 120


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def output_of(command: list[str], live: LiveMesh) -> str:
    environment = {**os.environ, "EXPERTMESH_HTTP": live.http}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


async def test_curl(live: LiveMesh) -> None:
    if shutil.which("curl") is None:
        pytest.skip("the examples for curl are not tested: curl is not installed")
    whole, stream = [await asyncio.to_thread(output_of, ["sh", "-c", example], live) for example in examples("sh")]
    assert json.loads(whole)["usage"]["completion_tokens"] == 16
    *_, usage, done = stream.strip().split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] <= 8


async def test_python(live: LiveMesh) -> None:
    (example,) = examples("python")
    output = await asyncio.to_thread(output_of, [sys.executable, "-P", "-c", example], live)
    assert len(output) > 24


async def test_error(live: LiveMesh) -> None:
    (example,) = examples("json")
    async with httpx2.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as http:
        answer = await http.post(f"{live.http}/v1/completions", json={"prompt": "a", "temperature": -1})
    assert (answer.status_code, answer.json()) == (400, json.loads(example))
