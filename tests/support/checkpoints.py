"""Small random checkpoints in Hugging Face's format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expertmesh.mesh.model.demo import demo_model_path
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.qwen3_moe import Qwen3Moe
from expertmesh.mesh.model.fields import Fields

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOKENIZER_VOCAB_SIZE = 8192
"""Of the demo model's tokenizer, which a checkpoint with at least so many tokens gets."""


def make_tiny_qwen3_moe(
    path: Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | None = None,
    fused: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random Qwen3-MoE checkpoint to a folder and return the folder.

    Weights are large enough that greedy outputs vary with the prompt. ``overrides`` are keys of ``Qwen3MoeConfig`` (see
    ``TINY`` for the defaults); ``num_experts`` may be given under that name.

    Args:
        dtype: what the files store.
        max_shard_size: as in ``save_pretrained``, such as ``"100KB"``; None = one file.
        fused: one tensor for all experts of a layer, as transformers 5 holds them; only without shards.
    """
    # Not at the top: importing transformers takes seconds, and most users of this module's constants need it not.
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**{**TINY, **overrides})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = Qwen3MoeForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embed" in name:
                parameter.normal_(0, 1)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size or "1GB")
    if fused:
        fuse_experts(path / "model.safetensors", config.num_hidden_layers, config.num_experts)
    if config.vocab_size >= TOKENIZER_VOCAB_SIZE:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_model_path() / name, path / name)
    return path


def write_checkpoint(path: Path, *, shards: int = 1, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> Path:
    """As ``make_tiny_qwen3_moe`` in milliseconds, without transformers; the weights make no model that says anything.

    ``overrides`` are keys of config.json. Tensors go to the shards in turn.
    """
    path.mkdir(parents=True)
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **TINY, **overrides}
    (path / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        named.name: torch.randn(named.shape, generator=generator).to(dtype)
        for named in _tensors(Fields(file="config.json", data=config))
    }
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = list(tensors)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def _tensors(config: Fields) -> list[NamedTensor]:
    family = Qwen3Moe()
    arch = family.read(config)
    tensors = list(family.model_tensors(arch).values())
    for layer in range(arch.num_layers):
        tensors += family.layer_tensors(arch, layer).values()
    for layer in arch.moe_layers:
        for expert in range(arch.num_experts):
            own = family.expert_tensors(arch, layer, expert)
            tensors += [own.gate, own.up, own.down]
    return tensors


def fuse_experts(file: Path, num_layers: int, num_experts: int) -> None:
    """Rewrite a ``model.safetensors`` with one tensor for all experts of a layer."""
    tensors = load_file(file)
    for prefix in (f"model.layers.{layer}.mlp.experts" for layer in range(num_layers)):
        if f"{prefix}.0.gate_proj.weight" not in tensors:
            continue
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}.{expert}.{part}_proj.weight") for expert in range(num_experts)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}.down_proj"] = parts["down"]
    save_file(tensors, file, metadata={"format": "pt"})
