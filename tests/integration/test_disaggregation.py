"""Two meshes: one computes prompts, the other one generates. The tokens are those of transformers, whichever way the KV
blocks travel."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from itertools import cycle, islice

import pytest

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.mesh.model.demo import demo_model_path
from support import mesh_state, reference
from support.kv_caches import NIXL_IS_MISSING, TRANSPORTS
from support.mesh import Output, demo_prompts, generate_all, greedy_request, mesh_config, start_mesh

pytestmark = pytest.mark.slow

NUM_PROMPTS, PROMPT_TOKENS, NUM_TOKENS = 6, 120, 16
TIMEOUT_S = 60.0
SMALL = {"attention__servers": 0, "expert__servers": 0, "telemetry__metrics_port": 0}


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    """It hands blocks over by TCP, and by NIXL where that is installed."""
    disaggregation = {"role": "prefill", "transport": "tcp" if NIXL_IS_MISSING else "nixl", "timeout_s": TIMEOUT_S}
    config = mesh_config(**SMALL, both_servers=1, disaggregation=disaggregation)
    mesh = start_mesh(tmp_path_factory.mktemp("prefill"), config, restart=True)
    yield mesh
    mesh.stop()


@pytest.fixture(scope="module", params=TRANSPORTS)
def decode(
    prefill: LocalMesh, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[LocalMesh]:
    # Blocks that were late would be computed again, which is right and not what is counted here.
    disaggregation = {
        "role": "decode",
        "prefill_balancer": prefill.balancer,
        "min_prompt_tokens": 32,
        "transport": request.param,
        "timeout_s": TIMEOUT_S,
    }
    config = mesh_config(**SMALL, both_servers=2, disaggregation=disaggregation)
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
