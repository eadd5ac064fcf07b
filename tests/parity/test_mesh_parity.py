"""Promise 1, same tokens: a mesh of real processes gives transformers' greedy tokens, whatever its shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from expertmesh.mesh.model.demo import demo_model_path
from support import reference
from support.checkpoints import make_tiny_qwen3_moe
from support.mesh import Meshes, Output, demo_prompts, generate_all, greedy_request

pytestmark = [pytest.mark.slow]

NUM_TOKENS = 48
DEMO_EOS = 0
NUM_EXPERTS = 32

SHAPES = {
    "1x1": {"attention__servers": 1, "expert__servers": 1},
    "1x2": {"attention__servers": 1, "expert__servers": 2},
    "2x3": {"attention__servers": 2, "expert__servers": 3},
    "2x4": {"attention__servers": 2, "expert__servers": 4},
    "both2": {"attention__servers": 0, "expert__servers": 0, "both_servers": 2},
}
MESHES = [(shape, NUM_EXPERTS) for shape in SHAPES] + [("1x2", 48), ("2x3", 40), ("2x4", 72), ("both2", 64)]


@pytest.fixture(scope="module")
def demo_reference() -> tuple[list[str], list[tuple[int, ...]]]:
    """Prompts of every domain and transformers' continuation."""
    path = demo_model_path()
    prompts = [prompt.text for prompt in demo_prompts()]
    encoded = tuple(reference.encode(path, prompt) for prompt in prompts)
    return prompts, list(reference.greedy(path, encoded, NUM_TOKENS, DEMO_EOS))


def generated(output: Output, eos_token_id: int | None = DEMO_EOS) -> tuple[int, ...]:
    """Without the end-of-sequence token."""
    ids = output.token_ids
    return tuple(ids[:-1] if ids and ids[-1] == eos_token_id else ids)


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize(("shape", "num_slots"), MESHES, ids=lambda value: str(value))
async def test_demo_model(
    meshes: Meshes,
    demo_reference: tuple[list[str], list[tuple[int, ...]]],
    shape: str,
    num_slots: int,
    concurrency: int,
) -> None:
    mesh = meshes.get(**SHAPES[shape], expert__num_slots=num_slots)
    prompts, expected = demo_reference
    if concurrency == 1:  # one request after another costs a step a token: three of each domain's five prompts
        kept = [index for index in range(len(prompts)) if index % 5 < 3]
        prompts, expected = [prompts[index] for index in kept], [expected[index] for index in kept]
    assert len(prompts) >= 24
    requests = [greedy_request(prompt, NUM_TOKENS) for prompt in prompts]
    outputs = await generate_all(mesh.router, requests, concurrency=concurrency)
    for prompt, output, tokens in zip(prompts, outputs, expected, strict=True):
        assert generated(output) == tokens, prompt


async def test_demo_model_over_gloo(meshes: Meshes, demo_reference: tuple[list[str], list[tuple[int, ...]]]) -> None:
    mesh = meshes.get(**SHAPES["2x3"], expert__num_slots=40, dataplane__backend="gloo")
    prompts, expected = demo_reference
    outputs = await generate_all(
        mesh.router, [greedy_request(prompt, NUM_TOKENS) for prompt in prompts], concurrency=16
    )
    assert [generated(output) for output in outputs] == expected


TINY_MODELS: dict[str, dict[str, Any]] = {
    "dense-between": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "top1-tied": {"num_experts_per_tok": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
    "one-kv-head": {"num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 3, "attention_bias": True},
}


@st.composite
def tiny_models(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a small Qwen3-MoE configuration with at least one MoE layer."""
    num_layers, step = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    sparse = [layer for layer in range(num_layers) if (layer + 1) % step == 0] or [num_layers - 1]
    num_kv_heads, num_experts = draw(st.sampled_from([1, 2])), draw(st.integers(3, 9))
    return {
        "num_hidden_layers": max(num_layers, step),
        "decoder_sparse_step": step,
        "mlp_only_layers": draw(st.lists(st.sampled_from(sparse), unique=True, max_size=len(sparse) - 1)),
        "hidden_size": draw(st.sampled_from([32, 40, 64])),
        "num_attention_heads": num_kv_heads * draw(st.sampled_from([1, 2, 3])),
        "num_key_value_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from([8, 16, 24])),
        "moe_intermediate_size": draw(st.sampled_from([8, 24, 40])),
        "num_experts": num_experts,
        "num_experts_per_tok": draw(st.integers(1, min(4, num_experts))),
        "norm_topk_prob": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
    }


async def assert_as_transformers(meshes: Meshes, path: Path) -> None:
    prompts = tuple(tuple(range(2 + 31 * i, 2 + 31 * i + 1 + 5 * i)) for i in range(8))
    expected = reference.greedy(path, prompts, NUM_TOKENS, None)
    mesh = meshes.get(model__path=path, attention__servers=2, expert__servers=2)
    requests = [greedy_request(prompt, NUM_TOKENS, ignore_eos=True) for prompt in prompts]
    outputs = await generate_all(mesh.router, requests, concurrency=8)
    assert [generated(output, None) for output in outputs] == list(expected)


@pytest.mark.parametrize("name", list(TINY_MODELS))
async def test_random_checkpoint(meshes: Meshes, tmp_path: Path, name: str) -> None:
    path = make_tiny_qwen3_moe(tmp_path / name, seed=len(name), vocab_size=8192, **TINY_MODELS[name])
    await assert_as_transformers(meshes, path)


@settings(  # a mesh for each example: few of them, and no search for smaller ones
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(overrides=tiny_models(), seed=st.integers(0, 2**31))
async def test_drawn_checkpoint(
    meshes: Meshes, tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, Any], seed: int
) -> None:
    path = make_tiny_qwen3_moe(tmp_path_factory.mktemp("drawn") / "model", seed=seed, vocab_size=8192, **overrides)
    await assert_as_transformers(meshes, path)
