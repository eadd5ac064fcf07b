"""Every family against transformers on tiny random checkpoints: logits of prompts and of greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from expertmesh.attention_server.request import Sequence
from expertmesh.attention_server.sampler import Sampled
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
    "whole prompts in a batch": {"enable_prefix_caching": False},
    "chunks of 7, two at a time, blocks of 4": {"max_num_batched_tokens": 7, "max_num_seqs": 2, "block_size": 4},
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
    "glm4_moe_lite": [{"mlp_layer_types": ["sparse", "dense", "sparse"]}, {"rope_interleave": False}],
    "minimax_m2": [
        {"tie_word_embeddings": True},
        {"rotary_dim": 12, "rope_parameters": LLAMA3, "num_key_value_heads": 1},
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
    """Serves prompts and keeps the logits that their tokens were sampled from."""

    def __init__(self, path: Path, dtype: Literal["float32", "bfloat16"] = "float32", **config: Any) -> None:
        spec = load_spec(ModelConfig(path=path, dtype=dtype))
        checkpoint = Checkpoint(path)
        self.engine = LocalEngine(spec, checkpoint, SlotExperts(spec, checkpoint), **config)
        self._logits: dict[int, list[torch.Tensor]] = {}
        self._handle_of_row: dict[int, int] = {}
        self._sampler = self.engine.half._sampler
        self.engine.half._sampler = self  # type: ignore[assignment]  # a look inside, between model and sampler

    def open(self, row: int, sequence: Sequence) -> None:
        self._handle_of_row[row] = sequence.handle
        self._sampler.open(row, sequence)

    def close(self, row: int) -> None:
        self._sampler.close(row)

    def accept(self, rows_S: np.ndarray, tokens_S: np.ndarray) -> None:
        self._sampler.accept(rows_S, tokens_S)

    def choose(
        self, logits_SV: torch.Tensor, rows_S: np.ndarray, position_S: np.ndarray, drafted_S: Any = None
    ) -> Sampled:
        for row, logits_V in zip(rows_S.tolist(), logits_SV.clone(), strict=True):
            self._logits.setdefault(self._handle_of_row[row], []).append(logits_V)
        return self._sampler.choose(logits_SV, rows_S, position_S, drafted_S)

    def run(self, prompts: list[list[int]], num_tokens: int = NUM_TOKENS) -> list[tuple[list[int], torch.Tensor]]:
        """For each prompt its tokens and the logits of each, [tokens, V]."""
        self._logits.clear()
        self.engine.outputs.clear()
        for handle, prompt in enumerate(prompts):
            self.engine.submit(handle, prompt, max_tokens=num_tokens)
        self.engine.run()
        return [(self.engine.tokens(handle), torch.stack(self._logits[handle])) for handle in range(len(prompts))]


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
    said = set()
    for config in ENGINES.values():
        recorder = Recorder(path, **config)
        for prompt, (tokens, logits_TV) in zip(prompts(number), recorder.run(prompts(number)), strict=True):
            check(reference, prompt, tokens, logits_TV)
            said.add(tuple(tokens[-8:]))
    assert len(said) > 1, "the model says the same to every prompt"
    longest = prompts(number)[-1]
    (again,) = recorder.run([longest])  # from the prefix cache
    assert recorder.engine.half.engine.counts.prefix_hits > 0
    check(reference, longest, *again)


@pytest.mark.parametrize("family", CASES)
def test_bfloat16_is_close(tmp_path: Path, family: str) -> None:
    """As close as transformers itself is in bfloat16: a few hundredths of the spread of its log-probabilities."""
    path = families.make_family_checkpoint(tmp_path / family, family, seed=0, dtype=torch.bfloat16, **CASES[family][0])
    prompt = prompts(0)[3]
    with torch.inference_mode():
        truth_V = families.load_reference(path)(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    ((_, logits_TV),) = Recorder(path, dtype="bfloat16", max_num_batched_tokens=16).run([prompt], num_tokens=1)
    assert (logits_TV[0].log_softmax(-1) - truth_V).abs().mean() < 0.06 * truth_V.std()
