"""GLM-4.5 (``Glm4MoeForCausalLM``), as transformers' modeling_glm4_moe.py defines it: DeepSeek-V3's gate over
grouped-query attention of which half the features rotate."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.bias_corrected import bias_corrected_gate, shared_experts, sparse_mlp_tensors
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Glm4Moe(standard.UsualNames):
    name = "glm4_moe"
    architectures = ("Glm4MoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes, heads = standard.decoder_sizes(config, rms_norm_eps=1e-5), standard.head_sizes(config)
        experts = standard.expert_counts(config, "n_routed_experts", "num_local_experts")
        theta, rope = read_rope(config, heads["head_dim"], partial=0.5)
        return Architecture(
            **sizes,
            **heads,
            **experts,
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="head" if config.boolean("use_qk_norm", False) else "none"),
            gate=bias_corrected_gate(config, experts),
            shared=shared_experts(config),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", True),
            moe_layers=standard.moe_layers_after(config, "first_k_dense_replace", sizes["num_layers"], 1),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkv" if arch.attention_bias else ""),
            **sparse_mlp_tensors(arch, layer),
        }
