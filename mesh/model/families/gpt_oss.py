"""gpt-oss (``GptOssForCausalLM``), as transformers' modeling_gpt_oss.py defines it.

Attention sinks, every other layer with a sliding window, YaRN, experts with biases and a clamped activation.
"""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, ExpertVariant, GateVariant, Span
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields

DEFAULT_WINDOW, DEFAULT_ALPHA, DEFAULT_LIMIT = 128, 1.702, 7.0


class GptOss(standard.UsualModelNames):
    name = "gpt_oss"
    architectures = ("GptOssForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        sizes = standard.decoder_sizes(config, rms_norm_eps=1e-5)
        heads = standard.head_sizes(config)
        if not config.section("rope_parameters").data and not config.section("rope_scaling").data:
            raise config.error("rope_scaling", "is missing", "use a complete Hugging Face checkpoint")
        theta, rope = read_rope(config, heads["head_dim"], theta=150000.0)
        return Architecture(
            **{**sizes, "attention_bias": config.boolean("attention_bias", True)},
            **heads,
            **standard.expert_counts(config, "num_local_experts", "num_experts"),
            rope_theta=theta,
            rope=rope,
            attention=AttentionVariant(qk_norm="none", sinks=True, spans=_spans(config, sizes["num_layers"])),
            gate=GateVariant(bias=True),
            expert=ExpertVariant(
                biases=True,
                limit=config.number("swiglu_limit", DEFAULT_LIMIT),
                alpha=config.number("swiglu_alpha", DEFAULT_ALPHA),
            ),
            intermediate_size=config.integer("intermediate_size"),
            moe_intermediate_size=config.integer("intermediate_size"),
            # The softmax of the chosen logits alone, which is the same.
            norm_topk_prob=True,
            moe_layers=tuple(range(sizes["num_layers"])),
        )

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        router = f"model.layers.{layer}.mlp.router"
        return {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
            **standard.router_tensors(arch, f"{router}.weight"),
            "router_bias": NamedTensor(f"{router}.bias", (arch.num_experts,)),
        }

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> None:
        return None

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        prefix, width, hidden = f"model.layers.{layer}.mlp.experts", arch.moe_intermediate_size, arch.hidden_size
        count = arch.num_experts
        return FusedExpertTensors(
            gate_up=NamedTensor(f"{prefix}.gate_up_proj", (count, hidden, 2 * width)),
            down=NamedTensor(f"{prefix}.down_proj", (count, width, hidden)),
            gate_up_bias=NamedTensor(f"{prefix}.gate_up_proj_bias", (count, 2 * width)),
            down_bias=NamedTensor(f"{prefix}.down_proj_bias", (count, hidden)),
            transposed=True,
            interleaved=True,
        )


def _spans(config: Fields, num_layers: int) -> tuple[Span | None, ...]:
    window = Span("window", config.integer("sliding_window", DEFAULT_WINDOW))
    types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    return standard.spans_by_type(
        config, num_layers, {"full_attention": None, "sliding_attention": window}, default=types
    )
