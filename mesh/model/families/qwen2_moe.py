"""Qwen2-MoE (``Qwen2MoeForCausalLM``), as in transformers' modeling_qwen2_moe.py: a shared expert with a gate."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, Shared, Span
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields

DEFAULT_WINDOW, DEFAULT_WINDOW_LAYERS = 4096, 28


class Qwen2Moe(standard.UsualNames):
    name = "qwen2_moe"
    architectures = ("Qwen2MoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes, heads = standard.decoder_sizes(config), standard.head_sizes(config)
        theta, rope = read_rope(config, heads["head_dim"])
        return Architecture(
            **{**sizes, "attention_bias": config.boolean("qkv_bias", True)},
            **heads,
            **standard.expert_counts(config, "num_experts", "num_local_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="none", spans=_spans(config, sizes["num_layers"])),
            shared=Shared(width=config.integer("shared_expert_intermediate_size")),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", False),
            moe_layers=standard.moe_layers_by_step(config, sizes["num_layers"]),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        mlp = f"model.layers.{layer}.mlp"
        tensors = {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkv" if arch.attention_bias else ""),
        }
        if layer not in arch.moe_layers:
            return tensors | standard.dense_tensors(arch, mlp)
        return {
            **tensors,
            **standard.router_tensors(arch, f"{mlp}.gate.weight"),
            **standard.dense_tensors(arch, f"{mlp}.shared_expert", "shared_"),
            "shared_router": NamedTensor(f"{mlp}.shared_expert_gate.weight", (1, arch.hidden_size)),
        }


def _spans(config: Fields, num_layers: int) -> tuple[Span | None, ...]:
    if not config.boolean("use_sliding_window", False):
        return ()
    window = Span("window", config.integer("sliding_window", DEFAULT_WINDOW))
    last = config.integer("max_window_layers", DEFAULT_WINDOW_LAYERS, minimum=0)
    types = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(num_layers)]
    return standard.spans_by_type(
        config, num_layers, {"full_attention": None, "sliding_attention": window}, default=types
    )
