"""Llama 4's text model, as transformers' modeling_llama4.py defines it, alone or inside a checkpoint with vision.

Top-1 experts whose input the gate scales, a shared expert, chunked attention in layers with rotary embedding, and
layers without it whose queries grow with the position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expertmesh.mesh.model.architecture import Architecture, AttentionVariant, GateVariant, Shared, Span, Temperature
from expertmesh.mesh.model.families import standard
from expertmesh.mesh.model.families.base import FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.families.rope import read_rope
from expertmesh.mesh.model.fields import Fields
from expertmesh.mesh.model.quantisation.formats import check_quantisation

DEFAULT_CHUNK, DEFAULT_FLOOR, DEFAULT_SCALE = 8192, 8192.0, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama4:
    """``section``: where in config.json the text model is described; ``prefix`` of its tensors' names."""

    name: str
    architectures: tuple[str, ...]
    section: str = ""
    prefix: str = ""

    def read(self, config: Fields) -> Architecture:
        check_quantisation(config)
        text = config.section(self.section) if self.section else config
        sizes = standard.decoder_sizes(text, rms_norm_eps=1e-5)
        heads = standard.head_sizes(text)
        theta, rope = read_rope(text, heads["head_dim"], theta=500000.0, interleaved=True)
        standard.refuse(text, "num_experts_per_tok", 1, "only one expert's input can be scaled")
        width = text.integer("intermediate_size")
        return Architecture(
            **sizes,
            **heads,
            num_experts=text.integer("num_local_experts"),
            top_k=1,
            rope_theta=theta,
            rope=rope,
            attention=_attention(text, sizes["num_layers"]),
            gate=GateVariant(scoring="sigmoid", scales_input=True),
            shared=Shared(width=width),
            intermediate_size=text.integer("intermediate_size_mlp"),
            moe_intermediate_size=width,
            norm_topk_prob=False,
            moe_layers=_moe_layers(text, sizes["num_layers"]),
        )

    def model_tensors(self, arch: Architecture) -> Mapping[str, NamedTensor]:
        return self._prefixed(standard.model_tensors(arch))

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        block = f"model.layers.{layer}.feed_forward"
        tensors = {
            **standard.norm_tensors(arch, layer),
            **standard.attention_tensors(arch, layer, biases="qkvo" if arch.attention_bias else ""),
        }
        if layer in arch.moe_layers:
            tensors |= standard.router_tensors(arch, f"{block}.router.weight")
            tensors |= standard.dense_tensors(arch, f"{block}.shared_expert", "shared_")
        else:
            tensors |= standard.dense_tensors(arch, block)
        return self._prefixed(tensors)

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> None:
        return None

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        prefix = f"{self.prefix}model.layers.{layer}.feed_forward.experts"
        count, width, hidden = arch.num_experts, arch.moe_intermediate_size, arch.hidden_size
        return FusedExpertTensors(
            gate_up=NamedTensor(f"{prefix}.gate_up_proj", (count, hidden, 2 * width)),
            down=NamedTensor(f"{prefix}.down_proj", (count, width, hidden)),
            transposed=True,
        )

    def _prefixed(self, tensors: Mapping[str, NamedTensor]) -> dict[str, NamedTensor]:
        return {part: NamedTensor(self.prefix + named.name, named.shape) for part, named in tensors.items()}


LLAMA4_TEXT = Llama4(name="llama4_text", architectures=("Llama4ForCausalLM",))
LLAMA4 = Llama4(
    name="llama4", architectures=("Llama4ForConditionalGeneration",), section="text_config", prefix="language_model."
)


def _attention(config: Fields, num_layers: int) -> AttentionVariant:
    interval = config.integer("no_rope_layer_interval", 4)
    default = [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    has_rope = config.integers("no_rope_layers") or default
    if len(has_rope) < num_layers:
        raise config.error("no_rope_layers", "has no entry for each layer", "make it num_hidden_layers long")
    chunk = Span("chunk", config.integer("attention_chunk_size", DEFAULT_CHUNK))
    types = ["chunked_attention" if has_rope[layer] else "full_attention" for layer in range(num_layers)]
    temperature = Temperature(
        scale=config.number("attn_scale", DEFAULT_SCALE), floor=config.number("floor_scale", DEFAULT_FLOOR, minimum=1.0)
    )
    return AttentionVariant(
        qk_norm="l2_rotated" if config.boolean("use_qk_norm", True) else "none",
        spans=standard.spans_by_type(
            config, num_layers, {"full_attention": None, "chunked_attention": chunk}, default=types
        ),
        layers_without_rope=frozenset(layer for layer in range(num_layers) if not has_rope[layer]),
        temperature=temperature if _is_tuned(config) else None,
    )


def _is_tuned(config: Fields) -> bool:
    """``attn_temperature_tuning``: a boolean, or a number in the first published checkpoints."""
    key = "attn_temperature_tuning"
    is_number = isinstance(config.data.get(key), int | float) and not isinstance(config.data[key], bool)
    return config.number(key) > 0 if is_number else config.boolean(key, True)


def _moe_layers(config: Fields, num_layers: int) -> tuple[int, ...]:
    step = config.integer("interleave_moe_layer_step", 1)
    listed = config.integers("moe_layers") if config.has("moe_layers") else tuple(range(step - 1, num_layers, step))
    layers = tuple(sorted({layer for layer in listed if layer < num_layers}))
    if not layers:
        raise config.error(
            "interleave_moe_layer_step", "leaves no layer with experts", "use a Mixture-of-Experts model"
        )
    return layers
