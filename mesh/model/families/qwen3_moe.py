"""Qwen3-MoE (``Qwen3MoeForCausalLM``), as transformers' modeling_qwen3_moe.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Qwen3Moe(standard.UsualNames):
    name = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        if config.boolean("use_sliding_window", False) and config.has("sliding_window"):
            raise config.error(
                "use_sliding_window", "is true, which is not supported", "use a model with full attention"
            )
        sizes, heads = standard.decoder_sizes(config), standard.head_sizes(config)
        theta, rope = read_rope(config, heads["head_dim"])
        return Architecture(
            **sizes,
            **heads,
            # transformers 5 calls it num_local_experts and writes num_experts beside it; older ones write that only.
            **standard.expert_counts(config, "num_experts", "num_local_experts"),
            rope_theta=theta,
            rope=rope,
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", False),
            moe_layers=standard.moe_layers_by_step(config, sizes["num_layers"]),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        mlp = f"model.layers.{layer}.mlp"
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **(
                standard.router_tensors(arch, f"{mlp}.gate.weight")
                if layer in arch.moe_layers
                else standard.dense_tensors(arch, mlp)
            ),
        }
