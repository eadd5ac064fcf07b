"""The compiled decode path against the torch path of the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.host import MAX_TOKENS
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.attention_server.step_index import build_step_index
from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from support.attention import one_torch_thread
from support.checkpoints import write_checkpoint

BLOCK_SIZE, BLOCKS_OF_SEQUENCE = 4, 8
SHAPES: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "norm_topk_prob": False},
    {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 8},
    {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 34, "hidden_size": 50, "num_experts": 5},
]


class Side:
    """A model with a KV cache of its own."""

    def __init__(self, path: Path) -> None:
        self.spec: ModelSpec = load_spec(ModelConfig(path=path, dtype="float32"))
        cache = PagedKvCache(
            num_layers=self.spec.num_layers,
            num_blocks=MAX_TOKENS * BLOCKS_OF_SEQUENCE,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            dtype=self.spec.dtype,
        )
        self.model = DenseModel(self.spec, Checkpoint(path), cache)
        self.cache = cache

    def attend(
        self,
        starts: np.ndarray,
        counts: np.ndarray,
        blocks_SB: np.ndarray,
        x_TH: torch.Tensor,
        max_compiled_tokens: int,
    ) -> list[torch.Tensor]:
        """The residual stream after each layer's attention on the same input."""
        index = build_step_index(
            starts,
            counts,
            blocks_SB,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            max_compiled_tokens=max_compiled_tokens,
        )
        assert (index.tokens is not None) == bool(max_compiled_tokens)
        context = self.model.context(index)
        return [self.model.attention(layer, x_TH.clone(), context) for layer in range(self.spec.num_layers)]


@pytest.mark.parametrize("num_tokens", [1, 4, 7, MAX_TOKENS])
@pytest.mark.parametrize("overrides", SHAPES)
def test_equals_the_torch_path(tmp_path: Path, overrides: dict[str, Any], num_tokens: int) -> None:
    path = write_checkpoint(tmp_path / "tiny", dtype=torch.float32, **overrides)
    compiled, plain = Side(path), Side(path)
    spec = compiled.spec
    rng = np.random.default_rng(num_tokens)
    generator = torch.Generator().manual_seed(num_tokens)
    contexts = rng.integers(1, BLOCK_SIZE * BLOCKS_OF_SEQUENCE, num_tokens)
    contexts.sort()
    blocks_SB = rng.permutation(MAX_TOKENS * BLOCKS_OF_SEQUENCE).reshape(MAX_TOKENS, -1)[:num_tokens]
    assert compiled.model.max_compiled_tokens == MAX_TOKENS
    with one_torch_thread(), torch.inference_mode():
        for side in (compiled, plain):
            prompt_TH = torch.randn(int(contexts.sum()), spec.hidden_size, generator=torch.Generator().manual_seed(1))
            side.attend(np.zeros_like(contexts), contexts, blocks_SB, prompt_TH, 0)
        x_TH = torch.randn(num_tokens, spec.hidden_size, generator=generator)
        ones = np.ones_like(contexts)
        found = compiled.attend(contexts, ones, blocks_SB, x_TH, MAX_TOKENS)
        expected = plain.attend(contexts, ones, blocks_SB, x_TH, 0)
        for layer in range(spec.num_layers):
            torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(compiled.cache.layer(layer), plain.cache.layer(layer), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("counts", [[5], [1, 1, 3, 8], [1, 16, 20], [2, 3]])
def test_chunks_of_prompts_beside_decoding(tmp_path: Path, counts: list[int]) -> None:
    path = write_checkpoint(tmp_path / "tiny", dtype=torch.float32)
    compiled, plain = Side(path), Side(path)
    starts, count_S = np.array([9, 0, 3, 6][: len(counts)]), np.array(counts)
    blocks_SB = np.random.default_rng(1).permutation(len(counts) * BLOCKS_OF_SEQUENCE).reshape(len(counts), -1)
    x_TH = torch.randn(sum(counts), compiled.spec.hidden_size, generator=torch.Generator().manual_seed(2))
    with one_torch_thread(), torch.inference_mode():
        found = compiled.attend(starts, count_S, blocks_SB, x_TH, MAX_TOKENS)
        expected = plain.attend(starts, count_S, blocks_SB, x_TH, 0)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_long_chunks_keep_to_torch() -> None:
    def compiled(starts: list[int], counts: list[int]) -> bool:
        blocks_SB = np.arange(len(starts) * 1000).reshape(len(starts), -1)
        index = build_step_index(
            np.array(starts), np.array(counts), blocks_SB, block_size=4, dtype=torch.float32, max_compiled_tokens=32
        )
        return index.tokens is not None

    assert compiled([3900], [1])
    assert compiled([3900] * 32, [1] * 32)
    assert not compiled([0] * 33, [1] * 33)
    assert compiled([0], [32])
    assert not compiled([3900], [32])


@pytest.mark.parametrize("overrides", SHAPES)
def test_the_gate_equals_the_torch_path(tmp_path: Path, overrides: dict[str, Any]) -> None:
    side = Side(write_checkpoint(tmp_path / "tiny", dtype=torch.float32, **overrides))
    generator = torch.Generator().manual_seed(3)
    with one_torch_thread(), torch.inference_mode():
        x_TH = torch.randn(MAX_TOKENS + 1, side.spec.hidden_size, generator=generator)
        for layer in side.spec.moe_layers:
            all_TH, all_routes = side.model.routed_input(layer, x_TH)  # one token too many: torch
            for count in (1, 6, MAX_TOKENS):
                normed_TH, routes = side.model.routed_input(layer, x_TH[:count])
                torch.testing.assert_close(normed_TH, all_TH[:count], rtol=1e-5, atol=1e-5)
                assert torch.equal(routes.expert_TK, all_routes.expert_TK[:count])
                torch.testing.assert_close(routes.weight_TK, all_routes.weight_TK[:count], rtol=1e-4, atol=1e-6)


def test_bfloat16_keeps_to_torch(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    spec = load_spec(ModelConfig(path=path, dtype="bfloat16"))
    cache = PagedKvCache(
        num_layers=spec.num_layers, num_blocks=4, block_size=4, num_kv_heads=2, head_dim=16, dtype=spec.dtype
    )
    model = DenseModel(spec, Checkpoint(path), cache)
    assert model.max_compiled_tokens == 0
    with one_torch_thread(), torch.inference_mode():
        normed_TH, routes = model.routed_input(spec.moe_layers[0], torch.zeros(2, spec.hidden_size, dtype=spec.dtype))
    assert normed_TH.dtype == torch.bfloat16
    assert isinstance(routes, Routes)
