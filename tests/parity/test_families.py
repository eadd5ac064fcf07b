"""Every family against transformers on tiny random checkpoints: logits of prompts and of greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.families import FAMILIES as SERVED
from expertmesh.mesh.model.spec import load_spec
from support import families
from support.attention import LocalEngine, SlotExperts, one_torch_thread

pytestmark = pytest.mark.slow

NUM_TOKENS = 32
TOLERANCE = 1e-4
PROMPT_LENGTHS = (1, 2, 13, 41, 90)
ENGINES: dict[str, dict[str, Any]] = {
    "whole prompts": {"enable_prefix_caching": False},
    "chunks of 7, blocks of 4": {"max_num_batched_tokens": 7, "block_size": 4},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"rope_parameters": YARN, "mlp_only_layers": [1]},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "attention_bias": True},
    ],
    "qwen2_moe": [
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "norm_topk_prob": True},
        {"qkv_bias": False, "mlp_only_layers": [0], "tie_word_embeddings": True, "hidden_size": 40},
    ],
    "mixtral": [{}, {"sliding_window": 11, "num_key_value_heads": 1, "head_dim": 10, "rope_parameters": LLAMA3}],
    "olmoe": [{"norm_topk_prob": True}, {"clip_qkv": 0.8, "attention_bias": True, "tie_word_embeddings": True}],
    "granitemoe": [{}, {"tie_word_embeddings": True, "attention_bias": True, "intermediate_size": 7}],
    "glm4_moe": [
        {"attention_bias": True, "n_shared_experts": 2},
        {"use_qk_norm": False, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
    ],
    "dots1": [
        {"rope_parameters": YARN},
        {"sliding_window": None, "attention_bias": True, "n_group": 1, "topk_group": 1},
    ],
    "gpt_oss": [
        {"rope_parameters": {**YARN, "truncate": False}, "swiglu_limit": 0.7},
        {"num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": True, "intermediate_size": 13},
    ],
    "deepseek_v2": [
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}, "num_experts_per_tok": 3},
        {"q_lora_rank": None, "topk_method": "greedy", "attention_bias": True, "tie_word_embeddings": True},
    ],
    "deepseek_v3": [
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "attention_bias": True},
        {
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "topk_group": 1,
        },
    ],
    "llama4_text": [
        {"interleave_moe_layer_step": 2, "rope_parameters": LLAMA3},
        {"use_qk_norm": False, "attn_temperature_tuning": False, "tie_word_embeddings": True, "attention_bias": True},
    ],
}
ALL = [(family, number) for family, cases in CASES.items() for number in range(len(cases))]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def test_every_family_has_cases() -> None:
    assert (
        sorted(CASES)
        == sorted(families.FAMILIES)
        == sorted(
            family.name
            for family in SERVED
            if family.name != "llama4"  # llama4_text in a checkpoint with vision
        )
    )


def prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 512, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


class Recorder:
    """Serves prompts one after the other and keeps the logits that tokens were sampled from."""

    def __init__(self, path: Path, **config: Any) -> None:
        spec = load_spec(ModelConfig(path=path))
        checkpoint = Checkpoint(path)
        self.engine = LocalEngine(spec, checkpoint, SlotExperts(spec, checkpoint), **config)
        self._logits: list[torch.Tensor] = []
        model = self.engine.half._model
        compute = model.logits

        def logits(x_TH: torch.Tensor) -> torch.Tensor:
            out_TV = compute(x_TH)
            self._logits.append(out_TV.clone())
            return out_TV

        model.logits = logits  # type: ignore[method-assign]  # a test's look inside

    def run(self, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        """The tokens and the logits of each."""
        self._logits.clear()
        self.engine.outputs.clear()
        self.engine.submit(1, prompt, max_tokens=NUM_TOKENS)
        self.engine.run()
        return self.engine.tokens(1), torch.cat(self._logits)


def check(reference: Any, prompt: list[int], tokens: list[int], logits_TV: torch.Tensor) -> None:
    with torch.inference_mode():
        expected_TV = reference(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    assert len(tokens) == NUM_TOKENS
    assert tokens == expected_TV.argmax(-1).tolist()
    assert (logits_TV - expected_TV).abs().max() <= TOLERANCE * expected_TV.abs().max()


@pytest.mark.parametrize(("family", "number"), ALL, ids=[f"{family}-{number}" for family, number in ALL])
def test_logits_and_greedy_tokens(tmp_path: Path, family: str, number: int) -> None:
    path = families.make_family_checkpoint(tmp_path / family, family, seed=number, **CASES[family][number])
    reference = families.load_reference(path)
    seen = set()
    for config in ENGINES.values():
        recorder = Recorder(path, **config)
        for prompt in prompts(number):
            tokens, logits_TV = recorder.run(prompt)
            check(reference, prompt, tokens, logits_TV)
            seen.add(tuple(tokens[-8:]))
        if "block_size" in config:  # once more, from the prefix cache
            check(reference, prompt, *recorder.run(prompt))
            assert recorder.engine.half.engine.counts.prefix_hits > 0
    assert len(seen) > 1, "the model says the same to every prompt"


@pytest.mark.parametrize("family", CASES)
def test_a_batch_is_served_as_one_by_one(tmp_path: Path, family: str) -> None:
    path = families.make_family_checkpoint(tmp_path / family, family, seed=7, **CASES[family][0])
    recorder = Recorder(path)
    alone = [recorder.run(prompt)[0] for prompt in prompts(3)]
    engine = Recorder(path, max_num_batched_tokens=16).engine
    for handle, prompt in enumerate(prompts(3)):
        engine.submit(handle, prompt, max_tokens=NUM_TOKENS)
    engine.run()
    assert [engine.tokens(handle) for handle in range(len(alone))] == alone
