"""Granite-MoE (``GraniteMoeForCausalLM``), as transformers' modeling_granitemoe.py defines it: four multipliers."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, Multipliers
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class GraniteMoe(standard.UsualModelNames):
    name = "granitemoe"
    architectures = ("GraniteMoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes, heads = standard.decoder_sizes(config), standard.head_sizes(config)
        theta, rope = read_rope(config, heads["head_dim"])
        scaling = config.number("logits_scaling", 1.0)
        if scaling == 0:
            raise config.error("logits_scaling", "is 0", "it must be positive")
        return Architecture(
            **sizes,
            **heads,
            **standard.expert_counts(config, "num_local_experts", "num_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="none", scale=config.number("attention_multiplier", 1.0)),
            multipliers=Multipliers(
                embedding=config.number("embedding_multiplier", 1.0),
                residual=config.number("residual_multiplier", 1.0),
                logits=1 / scaling,
            ),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("intermediate_size"),
            # The softmax of the chosen logits alone, which is the same.
            norm_topk_prob=True,
            moe_layers=tuple(range(sizes["num_layers"])),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **standard.router_tensors(arch, f"model.layers.{layer}.block_sparse_moe.router.layer.weight"),
        }

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> None:
        return None

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        prefix, width, hidden = f"model.layers.{layer}.block_sparse_moe", arch.moe_intermediate_size, arch.hidden_size
        return FusedExpertTensors(
            gate_up=NamedTensor(f"{prefix}.input_linear.weight", (arch.num_experts, 2 * width, hidden)),
            down=NamedTensor(f"{prefix}.output_linear.weight", (arch.num_experts, hidden, width)),
        )
