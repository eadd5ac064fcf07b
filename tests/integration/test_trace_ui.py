"""A whole request through a collector into a trace UI, and read back from it: `make telemetry-test`."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support.mesh import REQUEST_TIMEOUT_S, mesh_config, start_mesh
from support.mesh_state import swap_two_experts
from support.node import look
from support.tools import needs_tool
from support.trace_parts import Phoenix, running_phoenix, running_rotel

pytestmark = [pytest.mark.slow, needs_tool("rotel"), needs_tool("phoenix")]

NUM_TOKENS, NUM_LAYERS, NUM_RANKS = 24, 8, 3
ARRIVAL_TIMEOUT_S = 60.0


@contextmanager
def traced_mesh(folder: Path) -> Iterator[tuple[LocalMesh, Phoenix]]:
    """A mesh of one attention and two expert servers behind a collector; it starts beside the UI."""
    with ExitStack() as stack, ThreadPoolExecutor(1) as pool:
        phoenix = stack.enter_context(running_phoenix(folder))
        collector = stack.enter_context(running_rotel(folder, phoenix.otlp))
        config = mesh_config(
            attention__servers=1,
            expert__servers=2,
            telemetry__otlp_endpoint=collector,
            telemetry__trace_sample_ratio=0.0,
            telemetry__step_sample_interval_s=60.0,  # one step of each request
        )
        with mock.patch.dict(os.environ, OTEL_BSP_SCHEDULE_DELAY="200"):
            mesh = pool.submit(start_mesh, folder / "mesh", config).result()
        stack.callback(mesh.stop)
        yield mesh, phoenix


async def test_a_request_and_what_touched_it_are_found_in_the_ui(tmp_path: Path) -> None:
    with traced_mesh(tmp_path) as (mesh, phoenix):
        trace_id = secrets.token_hex(16)
        await asyncio.gather(generate(mesh, trace_id), swap_two_experts(mesh))
        spans = await asyncio.to_thread(until, lambda: whole(phoenix.spans(), trace_id))
        assert_whole(spans, trace_id)
        if shutil.which("chromium") is None:
            pytest.skip("read back over its API, but not looked at: there is no command 'chromium'")
        text = await seen_in_a_browser(phoenix, trace_id, tmp_path / "browser")
        for name in ("admission", "tokenise", "queue", "attention.request", "prefill chunk", "dispatch", "combine"):
            assert name in text


async def generate(mesh: LocalMesh, trace_id: str) -> None:
    async with rpc.open_channel(mesh.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        request = build_request("Am nächsten Morgen", max_tokens=NUM_TOKENS, ignore_eos=True, seed=5)
        metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
        async for _ in stub.Generate(request, metadata=metadata, timeout=REQUEST_TIMEOUT_S):
            pass


def until(found: Callable[[], list[dict[str, Any]] | None]) -> list[dict[str, Any]]:
    """Spans come in batches."""
    deadline_s = time.monotonic() + ARRIVAL_TIMEOUT_S
    while True:
        spans = found()
        if spans is not None:
            return spans
        assert time.monotonic() < deadline_s, "the UI has not got every span"
        time.sleep(0.3)


def whole(spans: list[dict[str, Any]], trace_id: str) -> list[dict[str, Any]] | None:
    """Everything, once the request is over, and the migration beside it, and a sampled step is there of every rank."""
    own = Counter(span["name"].split()[0] for span in spans if span["context"]["trace_id"] == trace_id)
    others = Counter(span["name"] for span in spans if span["context"]["trace_id"] != trace_id)
    is_there = own["generate"] and own["attention.request"] and own["step"] >= 3 and own["combine"] >= 3 * NUM_LAYERS
    return (
        spans if is_there and others["migration"] and others["rank migration"] >= 3 and others["view_change"] else None
    )


def assert_whole(spans: list[dict[str, Any]], trace_id: str) -> None:
    own = [span for span in spans if span["context"]["trace_id"] == trace_id]
    names = Counter(span["name"] for span in own)
    for phase in ("admission", "tokenise", "choose attention server", "prefill chunk", "decode"):
        assert names[phase] == 1, f"{phase}: {names}"
    assert names["queue"] == 2, "in the router and on the attention server"
    experts = [span["attributes"] for span in own if span["name"] == "expert_compute"]
    assert {"expert-0", "expert-1"} == {attributes["expertmesh.instance"] for attributes in experts}
    assert all("expertmesh.expert.rows" in attributes for attributes in experts)
    by_id = {span["context"]["span_id"]: span for span in own}
    orphans = [
        span["name"] for span in own if span["parent_id"] not in by_id and not span["name"].startswith("generate")
    ]
    assert not orphans, "every span hangs below the request"
    formation = next(span for span in spans if span["name"] == "view_change")
    entered = [span for span in spans if span["name"] == "enter view"]
    assert {span["parent_id"] for span in entered} == {formation["context"]["span_id"]}
    assert len(entered) == NUM_RANKS, "every rank of the view"


async def seen_in_a_browser(phoenix: Phoenix, trace_id: str, folder: Path) -> str:
    """The text of the trace's page; ``SCREENSHOT`` says where to leave a picture of it."""
    folder.mkdir()
    screenshot = os.environ.get("SCREENSHOT", str(folder / "trace.png"))
    return str((await look("trace.mjs", phoenix.url, trace_id, screenshot, folder=folder))["text"])
