"""MiniMax-M2 (``MiniMaxM2ForCausalLM``), as transformers' modeling_minimax_m2.py defines it.

A gate with a correction bias, queries and keys normed as a row, part of the features rotating.
"""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, GateVariant
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import ExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class MiniMaxM2(standard.UsualModelNames):
    name = "minimax_m2"
    architectures = ("MiniMaxM2ForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        standard.refuse(config, "scoring_func", "sigmoid", "not the gate of this family")
        standard.refuse(config, "shared_intermediate_size", 0, "transformers knows no shared experts here")
        sizes, heads = standard.decoder_sizes(config), standard.head_sizes(config)
        rotary_dim = config.integer("rotary_dim", heads["head_dim"])
        theta, rope = read_rope(config, heads["head_dim"], theta=5e6, partial=rotary_dim / heads["head_dim"])
        return Architecture(
            **{**sizes, "attention_bias": False},
            **heads,
            **standard.expert_counts(config, "num_local_experts", "num_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="row"),
            gate=GateVariant(scoring="sigmoid", correction=True),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("intermediate_size"),
            norm_topk_prob=True,
            moe_layers=tuple(range(sizes["num_layers"])),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        block = f"model.layers.{layer}.block_sparse_moe"
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer),
            **standard.router_tensors(arch, f"{block}.gate.weight"),
            "router_correction": NamedTensor(f"{block}.e_score_correction_bias", (arch.num_experts,), float32=True),
        }

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors:
        return standard.numbered_mlp_tensors(arch, f"model.layers.{layer}.block_sparse_moe.experts.{expert}")

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> None:
        return None
