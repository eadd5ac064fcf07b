"""DeepSeek-V2, DeepSeek-V3/R1 (and Kimi-K2, which is one) and GLM-4.7-Flash, as transformers defines them in
modeling_deepseek_v2.py, modeling_deepseek_v3.py and modeling_glm4_moe_lite.py.

All have multi-head latent attention, dense first layers and shared experts; V2 has another gate. What follows the last
layer in published checkpoints is in ``mesh.model.mtp``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, GateVariant, Latent
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.bias_corrected import (
    bias_corrected_gate,
    expert_groups,
    shared_experts,
    sparse_mlp_tensors,
)
from expertmesh.mesh.model.families.rope import read_rope, yarn_scale
from expertmesh.mesh.model.fields import Fields

DEFAULT_Q_RANK = 1536


Gate = Callable[[Fields, Mapping[str, Any]], GateVariant]


@dataclass(frozen=True, kw_only=True, slots=True)
class Deepseek(standard.UsualNames):
    """One of them; the last four are what transformers takes where config.json says nothing."""

    name: str
    architectures: tuple[str, ...]
    gate: Gate
    norm_topk_prob: bool
    first_dense: int
    num_shared: int
    rms_norm_eps: float = 1e-6

    def read(self, config: Fields) -> Architecture:
        standard.refuse(config, "moe_layer_freq", 1, "not supported")
        sizes = standard.decoder_sizes(config, rms_norm_eps=self.rms_norm_eps)
        experts = standard.expert_counts(config, "n_routed_experts", "num_experts", "num_local_experts")
        latent = _latent(config)
        theta, rope = read_rope(config, latent.rope_dim, interleaved=config.boolean("rope_interleave", True))
        num_heads = config.integer("num_attention_heads")
        return Architecture(
            **sizes,
            **experts,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=latent.nope_dim + latent.rope_dim,
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="none", scale=_scale(config, latent), latent=latent),
            gate=self.gate(config, experts),
            shared=shared_experts(config, default=self.num_shared),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", self.norm_topk_prob),
            moe_layers=_moe_layers(config, sizes["num_layers"], self.first_dense),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **_attention_tensors(arch, layer),
            **sparse_mlp_tensors(arch, layer),
        }


def _v2_gate(config: Fields, experts: Mapping[str, Any]) -> GateVariant:
    """Softmax scores, of the groups with the best expert where the model asks for it (arXiv:2405.04434)."""
    method = config.string("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise config.error("topk_method", f"is {method!r}", "it may be greedy or group_limited_greedy")
    standard.refuse(config, "scoring_func", "softmax", "not the gate of this family")
    standard.refuse(config, "norm_topk_prob", False, "transformers ignores it, and the authors' model does not")
    groups, chosen = expert_groups(config, experts) if method == "group_limited_greedy" else (1, 1)
    return GateVariant(
        num_groups=groups,
        top_groups=chosen,
        group_score="max",
        scale=config.number("routed_scaling_factor", 1.0),
        float32=True,
    )


def _v3_gate(config: Fields, experts: Mapping[str, Any]) -> GateVariant:
    standard.refuse(config, "topk_method", "noaux_tc", "not the gate of this family")
    standard.refuse(config, "scoring_func", "sigmoid", "not the gate of this family")
    return bias_corrected_gate(config, experts)


DEEPSEEK_V2 = Deepseek(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    gate=_v2_gate,
    norm_topk_prob=False,
    first_dense=0,
    num_shared=2,
)
DEEPSEEK_V3 = Deepseek(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    gate=_v3_gate,
    norm_topk_prob=True,
    first_dense=3,
    num_shared=1,
)


GLM4_MOE_LITE = Deepseek(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    gate=_v3_gate,
    norm_topk_prob=True,
    first_dense=1,
    num_shared=1,
    rms_norm_eps=1e-5,
)


def _moe_layers(config: Fields, num_layers: int, first_dense: int) -> tuple[int, ...]:
    """``mlp_layer_types`` of each layer, or all but the first ``first_k_dense_replace``."""
    kinds = config.data.get("mlp_layer_types")
    if kinds is None:
        return standard.moe_layers_after(config, "first_k_dense_replace", num_layers, first_dense)
    if not isinstance(kinds, list) or len(kinds) < num_layers or not {"sparse"} <= set(map(str, kinds[:num_layers])):
        raise config.error("mlp_layer_types", f"is {kinds!r:.80}", "it must name each layer, one as sparse at least")
    return tuple(layer for layer, kind in enumerate(kinds[:num_layers]) if kind == "sparse")


def _latent(config: Fields) -> Latent:
    # null = queries are not compressed; a missing key has transformers' default.
    absent = "q_lora_rank" not in config.data
    q_rank = config.integer("q_lora_rank", DEFAULT_Q_RANK) if absent or config.has("q_lora_rank") else None
    rope_dim = config.integer("qk_rope_head_dim", 64)
    if rope_dim % 2 != 0:
        raise config.error("qk_rope_head_dim", f"is {rope_dim}", "rotary embedding needs an even number")
    return Latent(
        q_rank=q_rank,
        kv_rank=config.integer("kv_lora_rank", 512),
        nope_dim=config.integer("qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=config.integer("v_head_dim", 128),
    )


def _scale(config: Fields, latent: Latent) -> float:
    """1/√ of the head's size, and with YaRN twice the factor that keeps the scores' spread."""
    scale = float((latent.nope_dim + latent.rope_dim) ** -0.5)
    old = config.section("rope_scaling")
    section = old if old.data else config.section("rope_parameters")
    all_dim = section.number("mscale_all_dim", 0.0)
    kind = section.string("rope_type", section.string("type", "default"))
    if kind == "default" or not all_dim:
        return scale
    return scale * yarn_scale(section.number("factor"), all_dim) ** 2


def _attention_tensors(arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
    latent, hidden = arch.attention.latent, arch.hidden_size
    assert latent is not None, "both families have latent attention"
    prefix = f"model.layers.{layer}.self_attn"
    queries, compressed = arch.num_heads * arch.head_dim, latent.kv_rank + latent.rope_dim
    tensors = {
        "kv_a_proj": NamedTensor(f"{prefix}.kv_a_proj_with_mqa.weight", (compressed, hidden)),
        "kv_a_norm": NamedTensor(f"{prefix}.kv_a_layernorm.weight", (latent.kv_rank,)),
        "kv_b_proj": NamedTensor(
            f"{prefix}.kv_b_proj.weight", (arch.num_heads * (latent.nope_dim + latent.value_dim), latent.kv_rank)
        ),
        "o_proj": NamedTensor(f"{prefix}.o_proj.weight", (hidden, arch.num_heads * latent.value_dim)),
    }
    if latent.q_rank is None:
        tensors["q_proj"] = NamedTensor(f"{prefix}.q_proj.weight", (queries, hidden))
    else:
        tensors["q_a_proj"] = NamedTensor(f"{prefix}.q_a_proj.weight", (latent.q_rank, hidden))
        tensors["q_a_norm"] = NamedTensor(f"{prefix}.q_a_layernorm.weight", (latent.q_rank,))
        tensors["q_b_proj"] = NamedTensor(f"{prefix}.q_b_proj.weight", (queries, latent.q_rank))
    if arch.attention_bias:
        tensors["kv_a_bias"] = NamedTensor(f"{prefix}.kv_a_proj_with_mqa.bias", (compressed,))
        tensors["o_bias"] = NamedTensor(f"{prefix}.o_proj.bias", (hidden,))
        if latent.q_rank is not None:
            tensors["q_a_bias"] = NamedTensor(f"{prefix}.q_a_proj.bias", (latent.q_rank,))
    return tensors
