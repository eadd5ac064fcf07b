"""Mixtral (``MixtralForCausalLM``), as transformers' modeling_mixtral.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, Span
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import ExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Mixtral(standard.UsualModelNames):
    name = "mixtral"
    architectures = ("MixtralForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes = standard.decoder_sizes(config, rms_norm_eps=1e-5)
        heads = standard.head_sizes(config)
        theta, rope = read_rope(config, heads["head_dim"], theta=1e6)
        window = Span("window", config.integer("sliding_window")) if config.has("sliding_window") else None
        return Architecture(
            **{**sizes, "attention_bias": False},
            **heads,
            **standard.expert_counts(config, "num_local_experts", "num_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="none", spans=(window,) * sizes["num_layers"] if window else ()),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("intermediate_size"),
            norm_topk_prob=True,
            moe_layers=tuple(range(sizes["num_layers"])),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer),
            **standard.router_tensors(arch, f"model.layers.{layer}.block_sparse_moe.gate.weight"),
        }

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors:
        return standard.numbered_mlp_tensors(arch, f"model.layers.{layer}.block_sparse_moe.experts.{expert}")

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> None:
        return None
