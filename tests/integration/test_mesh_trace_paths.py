"""One trace shows a request whole, whichever way it takes: through HTTP, with a constraint, over a server that dies."""

from __future__ import annotations

import asyncio
import json
import secrets
import urllib.request

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from support.live_mesh import LiveMesh
from support.live_trace import Trace, generating, servers_of
from support.mesh import REQUEST_TIMEOUT_S
from support.mesh_state import until
from support.otlp_collector import attributes

pytestmark = pytest.mark.slow

RECOVERY_TIMEOUT_S = 60.0


def post(url: str, body: dict[str, object], traceparent: str) -> None:
    headers = {"content-type": "application/json", "traceparent": traceparent}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
        assert len(json.load(response)["choices"]) == body["n"]


def children(trace: Trace, parent: Span) -> list[str]:
    """The names of a span's children, in the order in which they began; steps are left out."""
    found = [span for span in trace.spans if span.parent_span_id == parent.span_id and span.name != "step"]
    found.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    return [span.name for span in found]


async def runs_on(live: LiveMesh, servers: list[str]) -> str:
    """Which of the attention servers has a request, once one has."""
    found = ""

    async def is_found() -> bool:
        nonlocal found
        for server in servers:
            if (await asyncio.to_thread(live.metrics, server))["vllm:num_requests_running"]:
                found = server
        return bool(found)

    await until(is_found, RECOVERY_TIMEOUT_S, lambda: f"none of {servers} has it")
    return found


async def test_constrained_choices_over_http_are_one_trace(live: LiveMesh) -> None:
    trace_id, client_span = secrets.token_hex(16), secrets.token_hex(8)
    body = {
        "model": "expertmesh-demo",
        "prompt": "Once",
        "max_tokens": 4,
        "n": 2,
        "structured_outputs": {"regex": "a+"},
    }
    await asyncio.to_thread(post, f"{live.http}/v1/completions", body, f"00-{trace_id}-{client_span}-01")
    trace = Trace(live.collector, trace_id)
    await asyncio.to_thread(trace.wait_for, {"choices": 1, "generate": 2, "attention.request": 2})
    (choices,) = trace.named("choices")
    assert choices.parent_span_id.hex() == client_span
    assert attributes(choices.attributes)["expertmesh.choices"] == 2
    by_parent = {span.parent_span_id: span for span in trace.named("attention.request")}
    for router in trace.named("generate"):
        assert router.parent_span_id == choices.span_id
        assert attributes(router.attributes)["expertmesh.constraint"] == "regex"
        own = ["admission", "tokenise", "constraint", "queue", "choose attention server", "attention.request"]
        assert children(trace, router) == own
        assert children(trace, by_parent[router.span_id]) == ["constraint", "queue", "prefill chunk", "decode"]


async def test_a_request_that_outlives_its_attention_server_stays_one_trace(live: LiveMesh) -> None:
    trace_id = secrets.token_hex(16)
    trace = Trace(live.collector, trace_id)
    await live.until_idle()
    async with generating(live, trace_id):
        victim = await runs_on(live, live.attention_servers)
        live.mesh.kill(victim)
        await runs_on(live, [server for server in live.attention_servers if server != victim])
    await asyncio.to_thread(trace.wait_for, {"generate": 1, "attention.request": 1})
    (router,), (replay,) = trace.named("generate"), trace.named("replay")
    found = attributes(replay.attributes)
    assert replay.parent_span_id == router.span_id
    assert (found["expertmesh.from_server_id"], found["expertmesh.replays"]) == (victim, 1)
    again = [span for span in trace.named("attention.request") if servers_of([span]) == {found["expertmesh.server_id"]}]
    (attention,) = again
    assert attention.parent_span_id == router.span_id
    assert attributes(attention.attributes)["expertmesh.replayed_tokens"] == found["expertmesh.output_tokens"] > 0
    await until(live.is_whole, RECOVERY_TIMEOUT_S, lambda: f"{victim} does not come back")
