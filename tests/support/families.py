"""Tiny random checkpoints of every family, made by transformers, and what it answers on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.fields import Fields
from expertmesh.mesh.model.spec import needed_tensors
from expertmesh.mesh.model.tensors import TensorIndex
from support.checkpoints import TOKENIZER_VOCAB_SIZE

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GLM_MOE: dict[str, Any] = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 14,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 20, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 28},
    "mixtral": {"num_local_experts": 6},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 2},
    "granitemoe": {
        "num_local_experts": 6,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
        "attention_multiplier": 0.2,
    },
    "glm4_moe": {**GLM_MOE, "head_dim": 16, "use_qk_norm": True},
    "dots1": {**GLM_MOE, "head_dim": 16, "sliding_window": 10, "max_window_layers": 2},
    "gpt_oss": {"num_local_experts": 6, "head_dim": 16, "sliding_window": 8},
    "deepseek_v2": {**GLM_MOE, **LATENT, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": {**GLM_MOE, **LATENT},
    "glm4_moe_lite": {**GLM_MOE, **LATENT},
    "minimax_m2": {"num_local_experts": 8, "head_dim": 12, "rotary_dim": 6},
    "llama4_text": {
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 36,
        "head_dim": 12,
        "num_hidden_layers": 4,
        "attention_chunk_size": 16,
        "no_rope_layer_interval": 2,
        "floor_scale": 10,
        "attn_scale": 0.3,
    },
}
"""Every family and the keys of its configuration that make a tiny model of it."""


def make_family_checkpoint(
    path: Path, family: str, *, seed: int, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a random checkpoint of a family to a folder and return the folder.

    Weights, and everything else that is learnt, are large enough that greedy outputs vary with the prompt and that
    each part changes them. ``overrides`` are keys of the family's configuration in transformers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **overrides})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _fill(name, tensor)
    model.to(dtype).save_pretrained(path)
    if config.vocab_size >= TOKENIZER_VOCAB_SIZE:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model_path() / name, path / name)
    return path


def write_family_checkpoint(path: Path, family: str, **overrides: Any) -> Path:
    """As ``make_family_checkpoint`` in milliseconds, without transformers; no model that says anything.

    ``overrides`` are keys of config.json.
    """
    path.mkdir(parents=True)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = {"model_type": family, **SIZES, **FAMILIES[family], **rope, **overrides}
    (path / "config.json").write_text(json.dumps(config))
    reader = family_by_name(family)
    arch = reader.read(Fields(file="config.json", data=config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        named.name: torch.randn(named.shape, generator=generator)
        for named in needed_tensors(reader, arch, TensorIndex(path=path, entries={}))
    }
    save_file(tensors, path / "model.safetensors")
    return path


def _fill(name: str, tensor: torch.Tensor) -> None:
    kind = name.rsplit(".", maxsplit=1)[-1]
    if "inv_freq" in name:
        return
    if "norm" in name:
        tensor.uniform_(0.5, 1.5)
    elif kind == "e_score_correction_bias":
        tensor.normal_(0, 0.1)
    elif "bias" in kind or kind == "sinks":
        tensor.normal_(0, 0.5)
    elif "embed" in name:
        tensor.normal_(0, 1)
    else:
        # Fused tensors of experts have their inputs last or, transposed, before.
        inputs = tensor.shape[-1] if tensor.dim() == 2 else min(tensor.shape[-2:])
        tensor.normal_(0, 1.5 * inputs**-0.5)


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    # Eager experts, because transformers' default, grouped_mm, refuses widths that are no multiple of 16 bytes.
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
