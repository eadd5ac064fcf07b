"""Families in a mesh of real processes, 2 attention and 2 expert servers with replicas: transformers' greedy tokens.

Those that ask most of it: shared experts and a compressed cache, experts with biases, experts whose input is scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import families
from support.mesh import Meshes, generate_all, greedy_request

pytestmark = pytest.mark.slow

NUM_TOKENS = 32
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 8},
    "gpt_oss": {"num_local_experts": 6},
    "llama4_text": {"num_local_experts": 5, "interleave_moe_layer_step": 2},
}


def continuation(reference: Any, prompt: list[int]) -> list[int]:
    with torch.inference_mode():
        output = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )
    return [int(token) for token in output[0, len(prompt) :]]


@pytest.mark.parametrize("family", CASES)
async def test_two_by_two_with_replicas(meshes: Meshes, tmp_path: Path, family: str) -> None:
    path = families.make_family_checkpoint(tmp_path / family, family, seed=5, vocab_size=8192, **CASES[family])
    prompts = [list(range(2 + 31 * i, 3 + 31 * i + 11 * i)) for i in range(6)]
    reference = families.load_reference(path)
    mesh = meshes.get(
        model__path=path,
        attention__servers=2,
        expert__servers=2,
        expert__num_slots=10,
        attention__max_num_batched_tokens=24,
    )
    requests = [greedy_request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in prompts]
    outputs = await generate_all(mesh.router, requests, concurrency=6)
    assert [output.token_ids for output in outputs] == [continuation(reference, prompt) for prompt in prompts]
