"""The attention half with plain experts against transformers: greedy float32 output, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import load_spec
from support.attention import LocalEngine, PlainExperts, one_torch_thread
from support.checkpoints import make_tiny_qwen3_moe
from support.reference import continuation

pytestmark = pytest.mark.slow

NUM_TOKENS = 32
DEMO_TEXTS = (
    "Once upon a time there was a little girl who",
    "It was a dark evening in November, and the old man",
    "Der alte Graf trat an das Fenster und",
    "Il était une fois dans un village",
    "En un lugar de la Mancha vivía",
    "def fibonacci(n):\n    if n < 2:\n",
    "harbour: a sheltered",
    "17 + 25 =",
    "a",
)
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "chunks of 7": {"max_num_batched_tokens": 7},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
    "two at a time": {"max_num_seqs": 2},
    "tiny KV cache": {"num_kv_blocks": 9, "block_size": 8},
    "blocks of 1": {"block_size": 1, "num_kv_blocks": 400},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


class Model:
    """One checkpoint on both sides."""

    def __init__(self, path: Path | None, dtype: str = "float32") -> None:
        from transformers import AutoModelForCausalLM

        self.spec = load_spec(ModelConfig(path=path, dtype=dtype))
        self.checkpoint = Checkpoint(self.spec.path)
        self.experts = PlainExperts(self.spec, self.checkpoint)
        self.reference = AutoModelForCausalLM.from_pretrained(self.spec.path, dtype=self.spec.dtype).eval()

    def engine(self, **config: Any) -> LocalEngine:
        return LocalEngine(self.spec, self.checkpoint, self.experts, **config)

    def expected(self, prompt: list[int]) -> list[int]:
        return continuation(self.reference, prompt, NUM_TOKENS)


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model(None)


@pytest.fixture(scope="module")
def demo_cases(demo: Model) -> list[tuple[list[int], list[int]]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.spec.path / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in DEMO_TEXTS]
    return [(prompt, demo.expected(prompt)) for prompt in prompts]


def check(engine: LocalEngine, cases: list[tuple[list[int], list[int]]]) -> None:
    for handle, (prompt, _) in enumerate(cases):
        engine.submit(handle, prompt, max_tokens=NUM_TOKENS)
    engine.run()
    assert [engine.tokens(handle) for handle in range(len(cases))] == [expected for _, expected in cases]
    assert engine.load.kv_cache_usage == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_demo_model_at_once(demo: Model, demo_cases: list[tuple[list[int], list[int]]], name: str) -> None:
    engine = demo.engine(**CONFIGS[name])
    check(engine, demo_cases)
    if name == "tiny KV cache":
        assert engine.half.engine.counts.preemptions > 0


def test_demo_model_one_by_one_and_again_from_the_prefix_cache(
    demo: Model, demo_cases: list[tuple[list[int], list[int]]]
) -> None:
    engine = demo.engine(block_size=4)
    for prompt, expected in demo_cases * 2:
        engine.outputs.clear()
        engine.submit(0, prompt, max_tokens=NUM_TOKENS)
        engine.run()
        assert engine.tokens(0) == expected
    assert engine.half.engine.counts.prefix_hits > 0


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": True, "tie_word_embeddings": True, "norm_topk_prob": False},
        {"mlp_only_layers": [0], "num_hidden_layers": 4, "decoder_sparse_step": 2},
        {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 8},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 34, "rope_theta": 1e6},
    ],
)
def test_tiny_models(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = Model(make_tiny_qwen3_moe(tmp_path / "tiny", seed=len(overrides), **overrides))
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 512, (length,), generator=generator).tolist() for length in (1, 2, 13, 40, 90)]
    cases = [(prompt, model.expected(prompt)) for prompt in prompts]
    for config in ({}, {"max_num_batched_tokens": 7}, {"num_kv_blocks": 20, "block_size": 8}):
        check(model.engine(**config), cases)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    model = Model(make_tiny_qwen3_moe(tmp_path / "tiny", seed=5, dtype=torch.bfloat16), dtype="bfloat16")
    prompt = list(range(3, 40))
    exact = model.reference.float()
    with torch.inference_mode():
        truth = exact(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    engine = model.engine(max_num_batched_tokens=16)
    engine.submit(1, prompt, max_tokens=1, logprobs=512)
    engine.run()
    found = engine.outputs[1][0].logprobs
    assert found is not None
    ours = torch.empty(512)
    ours[torch.tensor(found.top_ids)] = torch.tensor(found.top_values)
    assert (ours - truth).abs().mean() < 0.1 * truth.std()
