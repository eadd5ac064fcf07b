"""What most families share: the sizes of a decoder in config.json and the usual names of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmesh.mesh.model.architecture import Architecture, Span
from expertmesh.mesh.model.families.base import ExpertTensors, FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.fields import Fields
from expertmesh.mesh.model.quantisation.formats import check_quantisation

MAX_LAYERS = 10_000
"""More can only be a mistake, and would keep the reader busy for ever."""

Parts = dict[str, NamedTensor]


def decoder_sizes(config: Fields, *, rms_norm_eps: float = 1e-6) -> dict[str, Any]:
    """The fields of ``Architecture`` that have the same keys in every family, heads and experts left out."""
    check_quantisation(config)
    refuse_other_activations(config)
    return {
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": config.integer("hidden_size"),
        "num_layers": config.integer("num_hidden_layers", maximum=MAX_LAYERS),
        "rms_norm_eps": config.number("rms_norm_eps", rms_norm_eps),
        "attention_bias": config.boolean("attention_bias", False),
        "tie_word_embeddings": config.boolean("tie_word_embeddings", False),
        "max_model_len": config.integer("max_position_embeddings"),
        "eos_token_ids": config.integers("eos_token_id"),
    }


def head_sizes(config: Fields) -> dict[str, Any]:
    """``num_heads``, ``num_kv_heads`` and ``head_dim`` of grouped-query attention."""
    num_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads != 0:
        raise config.error(
            "num_key_value_heads", f"is {num_kv_heads}", f"it must divide num_attention_heads = {num_heads}"
        )
    head_dim = config.integer("head_dim", max(1, config.integer("hidden_size") // num_heads))
    if head_dim % 2 != 0:
        raise config.error("head_dim", f"is {head_dim}", "rotary embedding needs an even head_dim")
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def expert_counts(config: Fields, *keys: str) -> dict[str, Any]:
    """``num_experts``, under any of its keys, and ``top_k``."""
    present = [key for key in keys if config.has(key)]
    counts = {config.integer(key) for key in present or keys[:1]}
    if len(counts) > 1:
        raise config.error(keys[0], f"and {present[-1]} differ: {sorted(counts)}", "make them equal")
    num_experts = counts.pop()
    top_k = config.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise config.error("num_experts_per_tok", f"is {top_k}", f"it must be at most {keys[0]} = {num_experts}")
    return {"num_experts": num_experts, "top_k": top_k}


def moe_layers_by_step(config: Fields, num_layers: int) -> tuple[int, ...]:
    """``decoder_sparse_step`` and ``mlp_only_layers``, as the Qwen families have them."""
    sparse_step = config.integer("decoder_sparse_step", 1)
    dense = set(config.integers("mlp_only_layers"))
    layers = tuple(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % sparse_step == 0)
    if not layers:
        raise config.error(
            "decoder_sparse_step", "and mlp_only_layers leave no layer with experts", "use a Mixture-of-Experts model"
        )
    return layers


def moe_layers_after(config: Fields, key: str, num_layers: int, default: int) -> tuple[int, ...]:
    """All layers but the first ``config[key]``."""
    first = config.integer(key, default, minimum=0)
    if first >= num_layers:
        raise config.error(key, f"is {first} and leaves no layer with experts", "use a Mixture-of-Experts model")
    return tuple(range(first, num_layers))


def spans_by_type(
    config: Fields, num_layers: int, sizes: Mapping[str, Span | None], default: list[str]
) -> tuple[Span | None, ...]:
    """What each layer sees, from ``layer_types``; () where all layers see everything.

    Args:
        sizes: the types that the family serves.
        default: the types where config.json does not list them.
    """
    types = config.data.get("layer_types") or default
    if not isinstance(types, list) or len(types) < num_layers:
        raise config.error("layer_types", "does not have an entry for each layer", "make it num_hidden_layers long")
    for kind in types[:num_layers]:
        if not isinstance(kind, str) or kind not in sizes:
            raise config.error("layer_types", f"has {kind!r}", f"it may have {', '.join(sizes)}")
    spans = tuple(sizes[kind] for kind in types[:num_layers])
    return spans if any(spans) else ()


def refuse_other_activations(config: Fields) -> None:
    activation = config.string("hidden_act", "silu")
    if activation != "silu":
        raise config.error("hidden_act", f"is {activation!r}, which is not supported", "use a model with silu")


def refuse(config: Fields, key: str, allowed: object, why: str) -> None:
    """Raises ``UserError`` unless the key is absent, null or has the one value that is served."""
    value = config.data.get(key)
    if value is not None and value != allowed:
        raise config.error(key, f"is {value!r}: {why}", f"use a model with {key} = {allowed}")


def model_tensors(arch: Architecture) -> Parts:
    tensors = {
        "embed": NamedTensor("model.embed_tokens.weight", (arch.vocab_size, arch.hidden_size)),
        "norm": NamedTensor("model.norm.weight", (arch.hidden_size,)),
    }
    if not arch.tie_word_embeddings:
        tensors["lm_head"] = NamedTensor("lm_head.weight", (arch.vocab_size, arch.hidden_size))
    return tensors


def norm_tensors(arch: Architecture, layer: int) -> Parts:
    prefix = f"model.layers.{layer}"
    return {
        "input_norm": NamedTensor(f"{prefix}.input_layernorm.weight", (arch.hidden_size,)),
        "post_attention_norm": NamedTensor(f"{prefix}.post_attention_layernorm.weight", (arch.hidden_size,)),
    }


def attention_tensors(arch: Architecture, layer: int, *, biases: str = "") -> Parts:
    """Grouped-query attention; ``biases``: the projections that have one, of "qkvo"."""
    prefix, hidden = f"model.layers.{layer}.self_attn", arch.hidden_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    tensors: Parts = {}
    for part, rows, columns in (
        ("q", queries, hidden),
        ("k", keys, hidden),
        ("v", keys, hidden),
        ("o", hidden, queries),
    ):
        tensors[f"{part}_proj"] = NamedTensor(f"{prefix}.{part}_proj.weight", (rows, columns))
        if part in biases:
            tensors[f"{part}_bias"] = NamedTensor(f"{prefix}.{part}_proj.bias", (rows,))
    if arch.attention.qk_norm in ("head", "row"):
        is_row = arch.attention.qk_norm == "row"
        tensors["q_norm"] = NamedTensor(f"{prefix}.q_norm.weight", (queries if is_row else arch.head_dim,))
        tensors["k_norm"] = NamedTensor(f"{prefix}.k_norm.weight", (keys if is_row else arch.head_dim,))
    if arch.attention.sinks:
        tensors["sinks"] = NamedTensor(f"{prefix}.sinks", (arch.num_heads,))
    return tensors


def mlp_tensors(prefix: str, width: int, hidden: int) -> ExpertTensors:
    return ExpertTensors(
        gate=NamedTensor(f"{prefix}.gate_proj.weight", (width, hidden)),
        up=NamedTensor(f"{prefix}.up_proj.weight", (width, hidden)),
        down=NamedTensor(f"{prefix}.down_proj.weight", (hidden, width)),
    )


def numbered_mlp_tensors(arch: Architecture, prefix: str) -> ExpertTensors:
    """An expert as Mixtral names it: gate, down and up are 1, 2 and 3."""
    width, hidden = arch.moe_intermediate_size, arch.hidden_size
    return ExpertTensors(
        gate=NamedTensor(f"{prefix}.w1.weight", (width, hidden)),
        up=NamedTensor(f"{prefix}.w3.weight", (width, hidden)),
        down=NamedTensor(f"{prefix}.w2.weight", (hidden, width)),
    )


def dense_tensors(arch: Architecture, prefix: str, kind: str = "") -> Parts:
    """A dense MLP; ``kind`` "shared_": the shared experts."""
    assert not kind or arch.shared is not None, "the model has no shared experts"
    width = arch.shared.width if kind and arch.shared is not None else arch.intermediate_size
    mlp = mlp_tensors(prefix, width, arch.hidden_size)
    return {f"{kind}gate_proj": mlp.gate, f"{kind}up_proj": mlp.up, f"{kind}down_proj": mlp.down}


def fused_tensors(arch: Architecture, prefix: str) -> FusedExpertTensors:
    """As transformers 5 holds experts."""
    width, hidden = arch.moe_intermediate_size, arch.hidden_size
    return FusedExpertTensors(
        gate_up=NamedTensor(f"{prefix}.gate_up_proj", (arch.num_experts, 2 * width, hidden)),
        down=NamedTensor(f"{prefix}.down_proj", (arch.num_experts, hidden, width)),
    )


def router_tensors(arch: Architecture, name: str) -> Parts:
    return {"router": NamedTensor(name, (arch.num_experts, arch.hidden_size))}


class UsualModelNames:
    """The embedding, the last norm and the head of a family that names them as most do."""

    def model_tensors(self, arch: Architecture) -> Parts:
        return model_tensors(arch)


class UsualNames(UsualModelNames):
    """The tensors of a family that names its experts' so as well; it has only its layers' to add."""

    def expert_tensors(self, arch: Architecture, layer: int, expert: int) -> ExpertTensors:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}"
        return mlp_tensors(prefix, arch.moe_intermediate_size, arch.hidden_size)

    def fused_expert_tensors(self, arch: Architecture, layer: int) -> FusedExpertTensors:
        return fused_tensors(arch, f"model.layers.{layer}.mlp.experts")
