"""KV blocks from one GPU's cache to another's, by NIXL: between two processes, and between two meshes.

PYTHONPATH=src:tests python -m pytest -c tests/gpu/pytest.ini tests/gpu/test_kv_handover.py
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.cli.local_mesh import LocalMesh
from expertmesh.cli.state_dir import StateDir
from expertmesh.mesh.model.demo import demo_model_path
from support import mesh_state
from support.kv_caches import (
    TIMEOUT_S,
    Cache,
    KvSource,
    digests_of,
    fetch,
    travelling,
)
from support.mesh import demo_prompts, generate_all, greedy_request, logs, mesh_config
from support.nixl import needs_nixl
from support.reference import encode, greedy

pytestmark = [pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"), needs_nixl]

NUM_BLOCKS, WIDTH = 256, 512
START_S = 150.0
NUM_PROMPTS, PROMPT_TOKENS, LENGTH = 6, 120, 32

_GIVER = f"""
import asyncio, sys
from support.kv_caches import Cache, digests_of, giving, source_of, travelling

async def main():
    cache = Cache(1, num_blocks={NUM_BLOCKS}, width={WIDTH}, device="cuda:1")
    cache.blocks.allocate(3)
    cache.compute(digests_of(200))
    with travelling(cache, "nixl") as transport:
        async with giving(cache, transport) as giver:
            source = source_of(giver)
            print(source.address, source.ticket.hex(), source.nixl_digest.hex(), flush=True)
            await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""


@pytest.fixture
def source() -> Iterator[KvSource]:
    """Of another process, on the second GPU."""
    giver = subprocess.Popen([sys.executable, "-c", _GIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert giver.stdout is not None
        address, ticket, digest = giver.stdout.readline().split()
        yield KvSource(address, bytes.fromhex(ticket), bytes.fromhex(digest))
    finally:
        giver.kill()
        giver.communicate(timeout=TIMEOUT_S)


def test_blocks_come_as_they_were(source: KvSource) -> None:
    ours, digests = Cache(0, num_blocks=2 * NUM_BLOCKS, width=WIDTH, device="cuda:0"), digests_of(200)
    theirs = Cache(1, num_blocks=NUM_BLOCKS, width=WIDTH)
    theirs.blocks.allocate(3)
    given = theirs.compute(digests)
    before = [ours.content(block) for block in range(2 * NUM_BLOCKS)]
    with travelling(ours, "nixl") as taking:
        assert asyncio.run(fetch(source, digests, ours, taking)) == 200
    found = ours.blocks.find_prefix(digests)
    for block, there in zip(found, given, strict=True):
        assert torch.equal(ours.content(block), theirs.content(there))
    for block in set(range(2 * NUM_BLOCKS)) - set(found):
        assert torch.equal(ours.content(block), before[block])


def start(folder: Path, gpus: str, **overrides: Any) -> LocalMesh:
    """A mesh of one server, on the first of the GPUs; it sees the others too."""
    config = mesh_config(
        device="cuda",
        dataplane__backend="nccl",
        balancer__view_timeout_s=START_S,
        attention__servers=0,
        expert__servers=0,
        both_servers=1,
        telemetry__metrics_port=0,
        attention__max_num_seqs=16,
        attention__kv_cache_bytes=2**28,
        **overrides,
    )
    mesh = LocalMesh(config, StateDir.claim(folder))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", gpus)
            mesh.start()
            mesh.wait_ready(START_S)
    except BaseException:
        mesh.stop()
        print(logs(mesh))
        raise
    return mesh


def handed_over(mesh: LocalMesh) -> float:
    """Blocks that the mesh's server has fetched."""
    return mesh_state.metrics(mesh, "both-0").get("expertmesh_kv_handover_blocks_total", 0.0)


def test_the_prompt_is_computed_on_one_gpu_and_the_text_on_another(tmp_path: Path) -> None:
    tokens = [encode(demo_model_path(), prompt.text) for prompt in demo_prompts()]
    prompts = [(sum(tokens[first:], ()) * 9)[:PROMPT_TOKENS] for first in range(NUM_PROMPTS)]
    requests = [greedy_request(prompt, LENGTH, ignore_eos=True) for prompt in prompts]
    with ExitStack() as stack:
        prefill = start(tmp_path / "prefill", "0,1", name="prefill", disaggregation={"role": "prefill"})
        stack.callback(prefill.stop)
        section = {"role": "decode", "prefill_balancer": prefill.balancer, "timeout_s": START_S}
        decode = start(tmp_path / "decode", "1,0", name="decode", disaggregation=section)
        stack.callback(decode.stop)

        strangers = (prompts[0][first:] + prompts[0][:first] for first in range(1, PROMPT_TOKENS))

        async def is_used() -> bool:
            await generate_all(decode.router, [greedy_request(next(strangers), 4)], concurrency=1)
            return await asyncio.to_thread(handed_over, decode) > 0

        asyncio.run(mesh_state.until(is_used, START_S, lambda: logs(decode)))
        before = handed_over(decode)
        outputs = asyncio.run(generate_all(decode.router, requests, concurrency=NUM_PROMPTS))
        block_size = decode.config.attention.block_size
        assert handed_over(decode) - before == NUM_PROMPTS * (PROMPT_TOKENS // block_size)
    expected = greedy(demo_model_path(), tuple(prompts), LENGTH, None)
    assert [tuple(output.token_ids) for output in outputs] == list(expected)
