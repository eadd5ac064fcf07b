"""What is read from a checkpoint, and what a slot computes, against transformers' model on the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.expert_server.server import ExpertServer
from expertmesh.mesh.config import ModelConfig, parse_config
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.spec import ModelSpec, load_spec
from expertmesh.mesh.telemetry import disabled_telemetry
from support.checkpoints import make_tiny_qwen3_moe

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "one file": {},
    "sharded": {"max_shard_size": "100KB"},
    "fused": {"fused": True},
    "stored in bfloat16, tied": {"dtype": torch.bfloat16, "tie_word_embeddings": True},
    "biases, dense layers": {"attention_bias": True, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    "odd sizes": {"moe_intermediate_size": 7, "hidden_size": 36, "head_dim": 10, "mlp_only_layers": [1]},
}


@pytest.fixture(params=[*CASES, "demo"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "demo":
        return demo_model_path()
    return make_tiny_qwen3_moe(tmp_path / "tiny", seed=7, **CASES[request.param])


def load_reference(path: Path) -> Any:
    from transformers import Qwen3MoeForCausalLM

    # Eager, because transformers' default, grouped_mm, refuses widths that are no multiple of 16 bytes.
    return Qwen3MoeForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")


def check_config(spec: ModelSpec, config: Any) -> None:
    assert spec.head_dim == config.head_dim
    assert (spec.num_experts, spec.top_k) == (config.num_experts, config.num_experts_per_tok)
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.rms_norm_eps == config.rms_norm_eps
    assert spec.norm_topk_prob == config.norm_topk_prob


def test_weights_and_experts_are_those_of_transformers(folder: Path) -> None:
    reference = load_reference(folder)
    spec, checkpoint = load_spec(ModelConfig(path=folder)), Checkpoint(folder)
    check_config(spec, reference.config)
    weights = checkpoint.model_tensors(spec)
    assert torch.equal(weights["embed"], reference.model.embed_tokens.weight)
    assert torch.equal(weights["norm"], reference.model.norm.weight)
    assert torch.equal(weights.get("lm_head", weights["embed"]), reference.lm_head.weight)

    config = parse_config({"expert": {"servers": 2, "slots_per_server": spec.num_experts}})
    experts = ExpertServer(config, spec, checkpoint, disabled_telemetry()).half
    order = torch.randperm(spec.num_experts, generator=torch.Generator().manual_seed(0)).tolist()
    experts.load(dict.fromkeys(spec.moe_layers, order))
    for layer, block in enumerate(reference.model.layers):
        dense = checkpoint.layer_tensors(spec, layer)
        assert torch.equal(dense["input_norm"], block.input_layernorm.weight)
        assert torch.equal(dense["post_attention_norm"], block.post_attention_layernorm.weight)
        for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            assert torch.equal(dense[part], getattr(block.self_attn, part).weight)
        for part in ("q", "k", "v", "o"):
            assert (f"{part}_bias" in dense) == spec.attention_bias
            if spec.attention_bias:
                assert torch.equal(dense[f"{part}_bias"], getattr(block.self_attn, f"{part}_proj").bias)
        if layer not in spec.moe_layers:
            for part in ("gate_proj", "up_proj", "down_proj"):
                assert torch.equal(dense[part], getattr(block.mlp, part).weight)
            continue
        assert torch.equal(dense["router"], block.mlp.gate.weight)
        check_experts(spec, block.mlp.experts, order, lambda x, c, layer=layer: experts.compute(layer, x, c))


def check_experts(spec: ModelSpec, reference: Any, order: list[int], compute: Any) -> None:
    """Each expert gets three rows, with weight 1."""
    rows_NH = torch.randn(3 * spec.num_experts, spec.hidden_size, generator=torch.Generator().manual_seed(1))
    chosen_N1 = torch.tensor(order).repeat_interleave(3).unsqueeze(1)
    with torch.inference_mode():
        expected_NH = reference(rows_NH, chosen_N1, torch.ones(len(rows_NH), 1))
        y_NH = compute(rows_NH, torch.full((spec.num_experts,), 3))
    torch.testing.assert_close(y_NH, expected_NH, rtol=1e-4, atol=1e-4)
