"""Qwen3-MoE (``Qwen3MoeForCausalLM``), as transformers' modeling_qwen3_moe.py defines it."""

from __future__ import annotations

from collections.abc import Mapping

from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.families.base import ExpertTensors, FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.fields import Fields

DEFAULT_ROPE_THETA = 10000.0
"""transformers' default where config.json says nothing."""

MAX_LAYERS = 10_000
"""More can only be a mistake, and would keep the reader busy for ever."""


class Qwen3Moe:
    name = "qwen3_moe"
    architectures = ("Qwen3MoeForCausalLM",)

    def read(self, config: Fields) -> Architecture:
        _refuse_unsupported(config)
        hidden_size = config.integer("hidden_size")
        num_layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
        num_heads = config.integer("num_attention_heads")
        num_kv_heads = config.integer("num_key_value_heads")
        if num_heads % num_kv_heads != 0:
            raise config.error(
                "num_key_value_heads", f"is {num_kv_heads}", f"it must divide num_attention_heads = {num_heads}"
            )
        head_dim = config.integer("head_dim", max(1, hidden_size // num_heads))
        if head_dim % 2 != 0:
            raise config.error("head_dim", f"is {head_dim}", "rotary embedding needs an even head_dim")
        num_experts = _num_experts(config)
        top_k = config.integer("num_experts_per_tok")
        if top_k > num_experts:
            raise config.error("num_experts_per_tok", f"is {top_k}", f"it must be at most num_experts = {num_experts}")
        return Architecture(
            vocab_size=config.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6),
            rope_theta=_rope_theta(config),
            attention_bias=config.boolean("attention_bias", False),
            tie_word_embeddings=config.boolean("tie_word_embeddings", False),
            max_model_len=config.integer("max_position_embeddings"),
            intermediate_size=config.integer("intermediate_size"),
            num_experts=num_experts,
            top_k=top_k,
            moe_intermediate_size=config.integer("moe_intermediate_size"),
            norm_topk_prob=config.boolean("norm_topk_prob", False),
            moe_layers=_moe_layers(config, num_layers),
            eos_token_ids=config.integers("eos_token_id"),
        )

    def model_tensors(self, arch: Architecture) -> Mapping[str, NamedTensor]:
        tensors = {
            "embed": NamedTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size)),
            "norm": NamedTensor("model.norm.weight", (arch.hidden_size,)),
        }
        if not arch.tie_word_embeddings:
            tensors["lm_head"] = NamedTensor("lm_head.weight", (arch.vocab_size, arch.hidden_size))
        return tensors

    def layer_tensors(self, arch: Architecture, layer: int) -> Mapping[str, NamedTensor]:
        prefix = f"model.layers.{layer}"
        hidden = arch.hidden_size
        tensors = {
            "input_norm": NamedTensor(f"{prefix}.input_layernorm.weight", (hidden,)),
            "post_attention_norm": NamedTensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            "q_norm": NamedTensor(f"{prefix}.self_attn.q_norm.weight", (arch.head_dim,)),
            "k_norm": NamedTensor(f"{prefix}.self_attn.k_norm.weight", (arch.head_dim,)),
        }
        queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        projections = (("q", queries, hidden), ("k", keys, hidden), ("v", keys, hidden), ("o", hidden, queries))
        for part, rows, columns in projections:
            tensors[f"{part}_proj"] = NamedTensor(f"{prefix}.self_attn.{part}_proj.weight", (rows, columns))
            if arch.attention_bias:
                tensors[f"{part}_bias"] = NamedTensor(f"{prefix}.self_attn.{part}_proj.bias", (rows,))
        if layer in arch.moe_layers:
            tensors["router"] = NamedTensor(f"{prefix}.mlp.gate.weight", (arch.num_experts, hidden))
        else:
            mlp = _mlp_tensors(f"{prefix}.mlp", arch.intermediate_size, hidden)
            tensors |= {"gate_proj": mlp.gate, "up_proj": mlp.up, "down_proj": mlp.down}
        return tensors

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors:
        return _mlp_tensors(f"model.layers.{layer}.mlp.experts.{expert}", arch.moe_intermediate_size, arch.hidden_size)

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        prefix, width, hidden = f"model.layers.{layer}.mlp.experts", arch.moe_intermediate_size, arch.hidden_size
        return FusedExpertTensors(
            gate_up=NamedTensor(f"{prefix}.gate_up_proj", (arch.num_experts, 2 * width, hidden)),
            down=NamedTensor(f"{prefix}.down_proj", (arch.num_experts, hidden, width)),
        )


def _mlp_tensors(prefix: str, width: int, hidden: int) -> ExpertTensors:
    return ExpertTensors(
        gate=NamedTensor(f"{prefix}.gate_proj.weight", (width, hidden)),
        up=NamedTensor(f"{prefix}.up_proj.weight", (width, hidden)),
        down=NamedTensor(f"{prefix}.down_proj.weight", (hidden, width)),
    )


def _refuse_unsupported(config: Fields) -> None:
    activation = config.string("hidden_act", "silu")
    if activation != "silu":
        raise config.error("hidden_act", f"is {activation!r}, which is not supported", "use a model with silu")
    if config.boolean("use_sliding_window", False) and config.has("sliding_window"):
        raise config.error(
            "use_sliding_window", "is true, and sliding windows are not supported", "use a model with full attention"
        )
    if config.has("quantization_config"):
        raise config.error(
            "quantization_config", "is set, and quantised weights are not supported", "use the checkpoint in bfloat16"
        )


def _num_experts(config: Fields) -> int:
    # transformers 5 calls it num_local_experts and writes num_experts beside it; older ones write num_experts only.
    keys = [key for key in ("num_experts", "num_local_experts") if config.has(key)]
    counts = {config.integer(key) for key in keys or ["num_experts"]}
    if len(counts) > 1:
        raise config.error("num_experts", f"and num_local_experts differ: {sorted(counts)}", "make them equal")
    return counts.pop()


def _moe_layers(config: Fields, num_layers: int) -> tuple[int, ...]:
    sparse_step = config.integer("decoder_sparse_step", 1)
    dense = set(config.integers("mlp_only_layers"))
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % sparse_step == 0)
    if not layers:
        raise config.error(
            "decoder_sparse_step", "and mlp_only_layers leave no layer with experts", "use a Mixture-of-Experts model"
        )
    return layers


def _rope_theta(config: Fields) -> float:
    """θ of plain rotary embedding, from transformers 5's ``rope_parameters`` or the older top-level keys."""
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.section(key)
        for type_key in ("rope_type", "type"):
            rope_type = rope.string(type_key, "default")
            if rope_type != "default":
                raise rope.error(type_key, f"is {rope_type!r}, which is not supported", "use a model with default RoPE")
        if rope.number("partial_rotary_factor", 1.0) != 1.0:
            raise rope.error("partial_rotary_factor", "is not 1, which is not supported", "use a model with full RoPE")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "is not 1, which is not supported", "use a model with full RoPE")
    top_level = config.number("rope_theta", DEFAULT_ROPE_THETA)
    theta = config.section("rope_parameters").number("rope_theta", top_level)
    if theta <= 0:
        raise config.error("rope_theta", f"is {theta}", "it must be positive")
    return theta
