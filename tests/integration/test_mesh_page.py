"""The balancer's page: what it answers, and what a browser shows of it."""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from expertmesh.mesh.model.demo import demo_model_path
from support.live_mesh import LiveMesh
from support.mesh import demo_prompts, generate_all, greedy_request
from support.mesh_state import until
from support.node import look

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
LAYER = 1


def get(url: str) -> tuple[int, dict[str, str], Any]:
    """Status, headers and body of an answer; JSON is parsed."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            status, headers, body = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        status, headers, body = error.code, error.headers, error.read()
    is_json = headers["content-type"].startswith("application/json")
    return status, {name.lower(): value for name, value in headers.items()}, json.loads(body) if is_json else body


async def traffic(live: LiveMesh) -> None:
    await generate_all(live.router, [greedy_request(prompt.text, 24) for prompt in demo_prompts()], concurrency=8)


async def page_of(live: LiveMesh) -> str:
    url = (await live.status()).page
    assert url.startswith("http://127.0.0.1:")
    return url


async def test_answers_of_the_api_are_those_of_the_admin_service(live: LiveMesh) -> None:
    url, status = await page_of(live), await live.status()
    code, headers, told = await asyncio.to_thread(get, f"{url}/api/status")
    assert code == 200
    assert told["mesh_id"] == status.mesh_id
    assert {server["server_id"] for server in told["servers"]} == {server.server_id for server in status.servers}
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert headers["cache-control"] == "no-store"
    _, _, placement = await asyncio.to_thread(get, f"{url}/api/placement")
    assert {layer["layer"] for layer in placement["layers"]} == set(status.model.moe_layers)
    assert len(placement["layers"][0]["slots"]) == status.num_slots
    _, _, events = await asyncio.to_thread(get, f"{url}/api/events")
    last = int(events[-1]["number"])
    _, _, newer = await asyncio.to_thread(get, f"{url}/api/events?after={last - 1}")
    assert int(newer[0]["number"]) == last


@pytest.mark.parametrize(
    ("path", "code", "reason"),
    [
        ("api/coactivation/4711", 400, "layer 4711 is no MoE layer"),
        ("api/events?after=-1", 400, "after is '-1'"),
        ("api/events?after=" + "9" * 40, 400, "after is"),
        ("api/nothing", 404, None),
        ("../../../../etc/passwd", 404, None),
        ("%2e%2e/app.py", 404, None),
    ],
)
async def test_bad_questions(live: LiveMesh, path: str, code: int, reason: str | None) -> None:
    found, _, body = await asyncio.to_thread(get, f"{await page_of(live)}/{path}")
    assert found == code
    if reason is not None:
        assert reason in body["error"]


async def test_coactivation_counts_the_pairs_of_the_tokens_routed(live: LiveMesh) -> None:
    await traffic(live)
    url = f"{await page_of(live)}/api/coactivation/{LAYER}"
    counted: dict[str, Any] = {}

    async def is_counted() -> bool:
        _, _, found = await asyncio.to_thread(get, url)
        counted.update(found)
        return bool(found["tokens"])

    await until(is_counted, TIMEOUT_S, lambda: f"no tokens were counted: {counted}")
    top_k = json.loads((demo_model_path() / "config.json").read_text())["num_experts_per_tok"]
    experts = counted["num_experts"]
    assert len(counted["pairs"]) == experts * (experts - 1) // 2
    assert sum(counted["pairs"]) == pytest.approx(counted["tokens"] * top_k * (top_k - 1) / 2, rel=1e-3)


async def test_a_browser_shows_the_mesh(live: LiveMesh, tmp_path: Path) -> None:
    await traffic(live)
    screenshot = Path(os.environ.get("SCREENSHOT", tmp_path / "page.png"))
    seen = await look("mesh_page.mjs", await page_of(live), str(LAYER), str(screenshot), folder=tmp_path)
    status = await live.status()
    assert seen["state"] == "serving"
    assert status.mesh_id in seen["facts"]
    assert set(live.ranks) <= set(seen["servers"])
    assert seen["layers"] == [str(layer) for layer in status.model.moe_layers]
    assert all(0 < float(value) <= 1 for value in seen["balancedness"])
    assert "committed" in seen["migrations"]
    assert "slot 0: expert" in seen["hint"]
    assert min(seen["colours"].values()) > 10
    assert any("view_published" in event for event in seen["events"])
    assert seen["problems"] == []
    assert seen["origins"] == [await page_of(live)]
    assert screenshot.read_bytes().startswith(b"\x89PNG")
