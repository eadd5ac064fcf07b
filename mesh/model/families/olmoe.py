"""OLMoE (``OlmoeForCausalLM``), as transformers' modeling_olmoe.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Olmoe(standard.UsualNames):
    name = "olmoe"
    architectures = ("OlmoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes = standard.decoder_sizes(config, rms_norm_eps=1e-5)
        heads = standard.head_sizes(config)
        if heads["num_heads"] * heads["head_dim"] != sizes["hidden_size"]:
            raise config.error(
                "head_dim", f"is {heads['head_dim']}", "it must be hidden_size / num_attention_heads in this family"
            )
        theta, rope = read_rope(config, heads["head_dim"])
        return Architecture(
            **sizes,
            **heads,
            **standard.expert_counts(config, "num_experts", "num_local_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(
                qk_norm="row", clip=config.number("clip_qkv") if config.has("clip_qkv") else None
            ),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", False),
            moe_layers=tuple(range(sizes["num_layers"])),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **standard.router_tensors(arch, f"model.layers.{layer}.mlp.gate.weight"),
        }
