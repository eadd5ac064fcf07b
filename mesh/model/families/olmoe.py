"""OLMoE (``OlmoeForCausalLM``), as transformers' modeling_olmoe.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import ExpertTensors, FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Olmoe:
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

    def model_tensors(self, arch: Architecture) -> Mapping[str, NamedTensor]:
        return standard.model_tensors(arch)

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **standard.router_tensors(arch, f"model.layers.{layer}.mlp.gate.weight"),
        }

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        return standard.mlp_tensors(prefix, arch.moe_intermediate_size, arch.hidden_size)

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        return standard.fused_tensors(arch, f"model.layers.{layer}.mlp.experts")
