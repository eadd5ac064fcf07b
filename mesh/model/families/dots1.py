"""dots.llm1 (``Dots1ForCausalLM``), as transformers' modeling_dots1.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, Span
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.families.bias_corrected import bias_corrected_gate, shared_experts, sparse_mlp_tensors
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields


class Dots1(standard.UsualNames):
    name = "dots1"
    architectures = ("Dots1ForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes, heads = standard.decoder_sizes(config), standard.head_sizes(config)
        experts = standard.expert_counts(config, "n_routed_experts", "num_local_experts")
        theta, rope = read_rope(config, heads["head_dim"])
        return Architecture(
            **sizes,
            **heads,
            **experts,
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="head", spans=_spans(config, sizes["num_layers"])),
            gate=bias_corrected_gate(config, experts),
            shared=shared_experts(config),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", False),
            moe_layers=standard.moe_layers_after(config, "first_k_dense_replace", sizes["num_layers"], 0),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **sparse_mlp_tensors(arch, layer),
        }


def _spans(config: Fields, num_layers: int) -> tuple[Span | None, ...]:
    """The layers from ``max_window_layers`` on see a window, unless ``layer_types`` says otherwise."""
    has_window = "sliding_window" not in config.data or config.has("sliding_window")
    window = Span("window", config.integer("sliding_window", 4096)) if has_window else None
    first = config.integer("max_window_layers", 62, minimum=0) if has_window else num_layers
    types = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    return standard.spans_by_type(
        config, num_layers, {"full_attention": None, "sliding_attention": window}, default=types
    )
