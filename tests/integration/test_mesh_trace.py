"""One trace from the client through router and attention server to every expert server; metrics under known names."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from expertmesh.mesh import rpc
from expertmesh.mesh.client import build_request
from expertmesh.mesh.config import TlsConfig
from expertmesh.v1 import generate_pb2_grpc
from support.live_mesh import LiveMesh
from support.live_trace import EXPORT_TIMEOUT_S, NUM_PROMPT_TOKENS, Trace, generating, servers_of
from support.mesh import REQUEST_TIMEOUT_S
from support.mesh_state import swap_two_experts, until
from support.otlp_collector import attributes

pytestmark = pytest.mark.slow

NUM_TOKENS = 4
NUM_LAYERS, TOP_K = 8, 4  # of the demo model, all of them with experts
RECOVERY_TIMEOUT_S = 60.0


def list_of(span: Span, key: str) -> list[int]:
    return [value.int_value for value in attributes(span.attributes)[key].values]


async def links_of(live: LiveMesh, trace_id: str, name: str, what: str) -> list[Span.Link]:
    """The links of this kind that a request's span has, once the span has been exported."""
    trace = Trace(live.collector, trace_id)
    await asyncio.to_thread(trace.wait_for, {name: 1})
    (span,) = trace.named(name)
    return [link for link in span.links if attributes(link.attributes)["expertmesh.link"] == what]


async def generate_traced(live: LiveMesh, traceparent: str) -> None:
    async with rpc.open_channel(live.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        request = build_request(
            [7] * NUM_PROMPT_TOKENS, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, seed=5
        )
        async for _ in stub.Generate(request, metadata=(("traceparent", traceparent),), timeout=REQUEST_TIMEOUT_S):
            pass


async def test_one_trace_through_every_server(live: LiveMesh) -> None:
    trace_id, client_span = secrets.token_hex(16), secrets.token_hex(8)
    await generate_traced(live, f"00-{trace_id}-{client_span}-01")
    trace = Trace(live.collector, trace_id)
    num_ranks, num_experts = len(live.ranks), len(live.ranks) - len(live.attention_servers)
    steps = NUM_TOKENS * num_ranks
    layers = steps * NUM_LAYERS
    numbers = {"generate": 1, "attention.request": 1, "step": steps, "dispatch": layers, "combine": layers}
    numbers |= dict.fromkeys(("admission", "tokenise", "choose", "prefill", "decode"), 1) | {"queue": 2}
    numbers["expert_compute"] = NUM_TOKENS * num_experts * NUM_LAYERS
    await asyncio.to_thread(trace.wait_for, numbers)
    assert Counter(span.name.split()[0] for span in trace.spans) == numbers

    (router,), (attention,) = trace.named("generate"), trace.named("attention.request")
    assert router.parent_span_id.hex() == client_span
    assert attention.parent_span_id == router.span_id
    assert servers_of([router]) == {"router-0"}
    assert servers_of([attention]) < set(live.attention_servers)
    experts = set(live.ranks) - set(live.attention_servers)
    assert servers_of(trace.named("step")) == set(live.ranks)
    assert servers_of(trace.named("expert_compute")) == experts
    assert_phases(trace, router, attention)
    assert_steps(trace, attention)
    assert_request_attributes(attributes(router.attributes))
    assert_request_attributes(attributes(attention.attributes))


def assert_phases(trace: Trace, router: Span, attention: Span) -> None:
    """What the router and the attention server did with the request, one after the other."""
    parents = {"router": router.span_id, "attention": attention.span_id}
    order = {
        "router": ["admission", "tokenise", "queue", "choose attention server"],
        "attention": ["queue", "prefill chunk", "decode"],
    }
    for owner, names in order.items():
        phases = [span for span in trace.spans if span.parent_span_id == parents[owner] and span.name in names]
        phases.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
        assert [span.name for span in phases] == names
        assert servers_of(phases) == servers_of([router if owner == "router" else attention])
    (prefill,) = trace.named("prefill")
    assert attributes(prefill.attributes)["expertmesh.chunk.tokens"] == NUM_PROMPT_TOKENS


def assert_steps(trace: Trace, attention: Span) -> None:
    """Each step is a child of the request and has every layer's exchange within its time, on every rank."""
    steps = {span.span_id: span for span in trace.named("step")}
    assert {span.parent_span_id for span in steps.values()} == {attention.span_id}
    for name in ("dispatch", "expert_compute", "combine"):
        layers: dict[bytes, set[int]] = {}
        for span in trace.named(name):
            step = steps[span.parent_span_id]
            assert step.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
            assert span.end_time_unix_nano <= step.end_time_unix_nano
            assert servers_of([span]) == servers_of([step])
            layers.setdefault(span.parent_span_id, set()).add(attributes(span.attributes)["expertmesh.layer"])
        assert all(seen == set(range(NUM_LAYERS)) for seen in layers.values())
    computed = sum(
        attributes(span.attributes)["expertmesh.expert_rank.tokens"] for span in trace.named("expert_compute")
    )
    assert computed >= (3 + NUM_TOKENS - 1) * NUM_LAYERS, "every token visits at least one expert server in every layer"
    rows = [list_of(span, "expertmesh.expert.rows") for span in trace.named("expert_compute")]
    experts = [list_of(span, "expertmesh.expert.ids") for span in trace.named("expert_compute")]
    assert [len(ids) for ids in experts] == [len(counts) for counts in rows]
    assert sum(map(sum, rows)) == (NUM_PROMPT_TOKENS + NUM_TOKENS - 1) * NUM_LAYERS * TOP_K, "each choice, once"
    own = [span.span_id for span in steps.values() if servers_of([span]) == servers_of([attention])]
    assert sorted(link.span_id for link in attention.links) == sorted(own), "the request leads to its steps"


def assert_request_attributes(found: dict[str, Any]) -> None:
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": "expertmesh-demo",
        "gen_ai.request.max_tokens": NUM_TOKENS,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.seed": 5,
        "gen_ai.usage.input_tokens": NUM_PROMPT_TOKENS,
        "gen_ai.usage.output_tokens": NUM_TOKENS,
    }
    assert {name: found.get(name) for name in expected} == expected


async def test_a_migration_is_a_trace_that_a_request_links_to(live: LiveMesh) -> None:
    trace_id = secrets.token_hex(16)
    async with generating(live, trace_id):
        await swap_two_experts(live.mesh)
    (link,) = await links_of(live, trace_id, "attention.request", "migration")
    migration = Trace(live.collector, link.trace_id.hex())
    await asyncio.to_thread(migration.wait_for, {"migration": 4, "rank": len(live.ranks), "switch": len(live.ranks)})
    (root,) = [span for span in migration.spans if span.name == "migration"]
    assert root.span_id == link.span_id
    assert not root.parent_span_id
    assert attributes(root.attributes)["expertmesh.migration.outcome"] == "committed"
    assert {span.name for span in migration.named("migration")} >= {"migration staging", "migration committing"}
    on_ranks = [span for span in migration.spans if span.name == "rank migration"]
    assert servers_of(on_ranks) == set(live.ranks)
    assert {span.parent_span_id for span in on_ranks} == {root.span_id}


async def test_a_failure_is_a_trace_that_a_request_links_to(live: LiveMesh) -> None:
    trace_id, victim, view = secrets.token_hex(16), "expert-2", (await live.status()).view_number

    async def has_next_view() -> bool:
        status = await live.status()
        return status.serving and status.view_number > view

    async with generating(live, trace_id):
        live.mesh.kill(victim)
        await until(has_next_view, RECOVERY_TIMEOUT_S, lambda: f"no view after {view}")
    (link, *later) = await links_of(live, trace_id, "attention.request", "view_change")
    (router_link,) = await links_of(live, trace_id, "generate", "view_change")
    assert router_link.span_id in {link.span_id, *(other.span_id for other in later)}
    failure, survivors = Trace(live.collector, link.trace_id.hex()), set(live.ranks) - {victim}
    await asyncio.to_thread(failure.wait_for, {"failure": 1, "view_change": 1, "enter": len(survivors)})
    changed = {span.span_id: span for span in failure.named("view_change")}[link.span_id]
    (root,) = failure.named("failure")
    assert changed.parent_span_id == root.span_id
    servers = attributes(changed.attributes)["expertmesh.view.servers"].values
    assert victim not in [value.string_value for value in servers]
    entered = [span for span in failure.named("enter") if span.parent_span_id == changed.span_id]
    assert servers_of(entered) == survivors
    assert servers_of(failure.named("interruption")) == survivors, "all of them were in the broken view"
    await until(live.is_whole, RECOVERY_TIMEOUT_S, lambda: f"{victim} does not come back")


async def test_request_outside_of_a_trace_leaves_no_spans(live: LiveMesh) -> None:
    unsampled, sampled = secrets.token_hex(16), secrets.token_hex(16)
    await generate_traced(live, f"00-{unsampled}-{secrets.token_hex(8)}-00")
    await generate_traced(live, f"00-{sampled}-{secrets.token_hex(8)}-01")
    await asyncio.to_thread(Trace(live.collector, sampled).wait_for, {"generate": 1, "attention.request": 1})
    assert Trace(live.collector, unsampled).spans == []


METRICS = {
    "attention": [
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:prefix_cache_queries_total",
        "expertmesh_step_duration_seconds_count",
        "expertmesh_dispatch_duration_seconds_count",
        "expertmesh_combine_duration_seconds_count",
        "expertmesh_view_number",
    ],
    "expert": [
        "expertmesh_step_duration_seconds_count",
        "expertmesh_expert_compute_duration_seconds_count",
        "expertmesh_expert_rank_tokens_total",
        "expertmesh_slots_loaded_total",
    ],
    "router": ["vllm:time_to_first_token_seconds_count", "vllm:request_success_total"],
}


GROWTH = {
    ("attention", "vllm:generation_tokens_total"): NUM_TOKENS,
    ("attention", "expertmesh_step_duration_seconds_count"): 2 * NUM_TOKENS,
    ("expert", "expertmesh_step_duration_seconds_count"): 3 * NUM_TOKENS,
    ("router", "vllm:request_success_total"): 1,
}
"""What one request adds, over the servers of a role."""
RANK_TOKENS = ("expert", "expertmesh_expert_rank_tokens_total")


async def test_metrics_have_their_names_and_count(live: LiveMesh) -> None:
    before = await settled(live)
    await generate_traced(live, "")

    async def all_counted() -> bool:
        now = await counted(live)
        return all(now[key] >= before[key] + growth for key, growth in GROWTH.items())

    await until(all_counted, EXPORT_TIMEOUT_S, lambda: f"not counted since {before}: {GROWTH}")
    after = await settled(live)
    assert {key: after[key] - before[key] for key in GROWTH} == GROWTH
    assert after[RANK_TOKENS] > before[RANK_TOKENS]
    for server in live.mesh.servers.values():
        found = await asyncio.to_thread(live.metrics, server.id)
        missing = [name for name in METRICS.get(server.role, []) if name not in found]
        assert not missing, f"{server.id} has {sorted(found)}"


async def counted(live: LiveMesh) -> Counter[tuple[str, str]]:
    found = Counter[tuple[str, str]]()
    for server in live.mesh.servers.values():
        values = await asyncio.to_thread(live.metrics, server.id) if server.role in METRICS else {}
        for role, name in (*GROWTH, RANK_TOKENS):
            found[role, name] += int(values.get(name, 0)) if role == server.role else 0
    return found


async def settled(live: LiveMesh) -> Counter[tuple[str, str]]:
    """What is counted once nothing runs: a step counts at its end, on each rank, a moment behind its tokens."""
    await live.until_idle()
    seen = [await counted(live)]

    async def is_settled() -> bool:
        seen.append(await counted(live))
        return len(seen) > 2 and seen[-1] == seen[-2] == seen[-3]

    await until(is_settled, EXPORT_TIMEOUT_S, lambda: f"an idle mesh counts on: {seen[-3:]}")
    return seen[-1]
