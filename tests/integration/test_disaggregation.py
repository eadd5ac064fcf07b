"""Two meshes: one computes prompts, the other one generates. The tokens are those of transformers, whichever way the KV
blocks travel."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from collections.abc import Iterator
from itertools import cycle, islice
from unittest import mock

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh import rpc
from expertmesh.mesh.config import TlsConfig
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.v1 import generate_pb2_grpc
from support import mesh_state, reference
from support.live_trace import Trace
from support.mesh import Output, demo_prompts, generate_all, greedy_request, mesh_config, start_mesh
from support.nixl import NIXL_IS_MISSING, TRANSPORTS
from support.otlp_collector import Collector, attributes, running_collector

pytestmark = pytest.mark.slow

NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 6, 120, 16
TIMEOUT_S = 60.0
SMALL = {"attention__servers": 0, "expert__servers": 0, "telemetry__metrics_port": 0}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as collector, mock.patch.dict(os.environ, OTEL_BSP_SCHEDULE_DELAY="500"):
        yield collector


def traced(collector: Collector) -> dict[str, object]:
    """Requests that bring a trace context, that is."""
    return {"telemetry__otlp_endpoint": collector.address, "telemetry__trace_sample_ratio": 0.0}


@pytest.fixture(scope="module")
def prefill(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """It hands blocks over by TCP, and by NIXL where that is installed."""
    disaggregation = {"role": "prefill", "transport": "tcp" if NIXL_IS_MISSING else "nixl", "timeout_s": TIMEOUT_S}
    config = mesh_config(**SMALL, **traced(collector), both_servers=1, disaggregation=disaggregation)
    mesh = start_mesh(tmp_path_factory.mktemp("prefill"), config, restart=True)
    yield mesh
    mesh.stop()


@pytest.fixture(scope="module", params=TRANSPORTS)
def decode(
    prefill: LocalMesh,
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[LocalMesh]:
    # Blocks that were late would be computed again, which is right and not what is counted here.
    disaggregation = {
        "role": "decode",
        "prefill_balancer": prefill.balancer,
        "min_prompt_tokens": 32,
        "transport": request.param,
        "timeout_s": TIMEOUT_S,
    }
    config = mesh_config(**SMALL, **traced(collector), both_servers=2, disaggregation=disaggregation)
    mesh = start_mesh(tmp_path_factory.mktemp("decode"), config)
    yield mesh
    mesh.stop()


def long_prompts(first: int) -> list[tuple[int, ...]]:
    """Prompts that share no prefix with those of another ``first``."""
    tokens = [reference.encode(demo_model_path(), prompt.text) for prompt in demo_prompts()]
    texts = [sum(tokens[start:], ()) for start in range(first, first + NUM_PROMPTS)]
    return [tuple(islice(cycle(text), PROMPT_TOKENS)) for text in texts]


def transformers(prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return list(reference.greedy(demo_model_path(), tuple(prompts), NUM_TOKENS, None))


async def generate(mesh: LocalMesh, prompts: list[tuple[int, ...]], **sampling: object) -> list[Output]:
    requests = [greedy_request(prompt, NUM_TOKENS, ignore_eos=True, **sampling) for prompt in prompts]
    return await generate_all(mesh.router, requests, concurrency=len(prompts))


async def total(mesh: LocalMesh, role: str, name: str) -> float:
    """Of a metric, over the servers of a role."""
    servers = [server.id for server in mesh.servers.values() if server.role == role]
    return sum([(await asyncio.to_thread(mesh_state.metrics, mesh, server)).get(name, 0.0) for server in servers])


async def until_linked(decode: LocalMesh, prefill: LocalMesh) -> None:
    """Until a long prompt is computed by the prefill mesh: its router's links come up behind ours."""

    async def is_used() -> bool:
        before = await total(prefill, "both", "vllm:generation_tokens_total")
        await generate(decode, long_prompts(0)[:1])
        return await total(prefill, "both", "vllm:generation_tokens_total") > before

    await mesh_state.until(is_used, TIMEOUT_S, lambda: "no prompt goes to the prefill mesh")


async def test_the_prompt_is_computed_there_and_the_text_generated_here(decode: LocalMesh, prefill: LocalMesh) -> None:
    await until_linked(decode, prefill)
    prompts = long_prompts(4)
    generated = await total(prefill, "both", "vllm:generation_tokens_total")
    computed = await total(decode, "both", "vllm:prompt_tokens_total")
    hits = await total(decode, "both", "vllm:prefix_cache_hits_total")
    blocks = await total(decode, "both", "expertmesh_kv_handover_blocks_total")
    outputs = await generate(decode, prompts)
    assert [tuple(output.token_ids) for output in outputs] == transformers(prompts)
    assert await total(prefill, "both", "vllm:generation_tokens_total") - generated == NUM_PROMPTS
    whole_blocks = NUM_PROMPTS * (PROMPT_TOKENS // 16)
    assert await total(decode, "both", "expertmesh_kv_handover_blocks_total") - blocks == whole_blocks
    assert await total(decode, "both", "vllm:prefix_cache_hits_total") - hits == 16 * whole_blocks
    assert await total(decode, "both", "vllm:prompt_tokens_total") - computed <= NUM_PROMPTS * PROMPT_TOKENS
    assert all(output.finish.replays == 0 for output in outputs)


async def test_one_trace_goes_through_both_meshes(decode: LocalMesh, prefill: LocalMesh, collector: Collector) -> None:
    await until_linked(decode, prefill)
    replays = await total(decode, "router", "expertmesh_replays_total")
    trace_id = secrets.token_hex(16)
    request = greedy_request(long_prompts(6)[0][::-1], NUM_TOKENS, ignore_eos=True)  # in nobody's cache
    async with rpc.open_channel(decode.router, TlsConfig()) as channel:
        stub = generate_pb2_grpc.GenerationServiceStub(channel)
        metadata = (("traceparent", f"00-{trace_id}-{secrets.token_hex(8)}-01"),)
        await stub.GenerateUnary(request, metadata=metadata, timeout=TIMEOUT_S)
    trace = Trace(collector, trace_id)
    await asyncio.to_thread(trace.wait_for, {"generate": 1, "attention.request": 2, "handover": 1, "kv": 1})
    (router,), (handover,), (fetched,) = trace.named("generate"), trace.named("handover"), trace.named("kv")
    chosen = [attributes(span.attributes) for span in trace.named("choose")]
    assert [one.get("expertmesh.prefill", False) for one in chosen] == [True, False]
    assert attributes(handover.attributes)["expertmesh.output_tokens"] == 1
    first, second = sorted(trace.named("attention.request"), key=lambda span: span.start_time_unix_nano)
    assert first.parent_span_id == second.parent_span_id == handover.parent_span_id == router.span_id
    assert attributes(second.attributes)["expertmesh.replayed_tokens"] == 1, "goes on behind the first token"
    assert fetched.parent_span_id == second.span_id
    assert attributes(fetched.attributes)["expertmesh.kv.blocks"] == PROMPT_TOKENS // 16
    assert not trace.named("replay")
    assert await total(decode, "router", "expertmesh_replays_total") == replays, "a handover is none"


async def test_sampled_text_is_the_same_on_either_way(decode: LocalMesh, prefill: LocalMesh) -> None:
    await until_linked(decode, prefill)
    prompts = long_prompts(8)
    apart = await generate(decode, prompts, temperature=1.0, seed=7)
    alone = await generate(prefill, prompts, temperature=1.0, seed=7)  # by its own router
    assert [output.token_ids for output in apart] == [output.token_ids for output in alone]


async def test_one_token_and_short_prompts_stay_here(decode: LocalMesh, prefill: LocalMesh) -> None:
    await until_linked(decode, prefill)
    before = await total(prefill, "both", "vllm:generation_tokens_total")
    prompts = long_prompts(2)
    await generate_all(decode.router, [greedy_request(prompts[0], 1)], concurrency=1)
    await generate(decode, [prompts[1][:20]])
    assert await total(prefill, "both", "vllm:generation_tokens_total") == before


async def test_a_prefill_server_that_dies_costs_no_request(decode: LocalMesh, prefill: LocalMesh) -> None:
    await until_linked(decode, prefill)
    prompts = long_prompts(12)
    running = asyncio.create_task(generate(decode, prompts))
    prefill.servers["both-0"].kill(signal.SIGKILL)
    outputs = await running
    assert [tuple(output.token_ids) for output in outputs] == transformers(prompts)
    again = await generate(decode, long_prompts(14))  # while it is away, or just back
    assert [tuple(output.token_ids) for output in again] == transformers(long_prompts(14))
