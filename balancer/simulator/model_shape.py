"""Sizes of models, as far as a step's time depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.architecture import Architecture, Latent
from expertmesh.mesh.model.families import find_family
from expertmesh.mesh.model.fields import read_fields


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A decoder with routed experts. Parameters are counts, flops multiply-adds times two.

    Args:
        dense_params: of all layers together, what every token is multiplied with on an attention rank: attention's
            projections, dense MLPs, shared experts, gates.
        head_params: of the LM head; only tokens that are sampled from see it.
        expert_params: of one expert.
        weight_bytes: of one parameter as it is read.
        kv_bytes: of one token in one layer.
        decode_flops: of one new token for each token of its context, in one layer.
        prefill_flops: of one prompt token for each token before it, in one layer.
        row_bytes: of one token in a dispatch, and in a combine.
    """

    name: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    dense_params: int
    head_params: int
    expert_params: int
    weight_bytes: float
    kv_bytes: int
    decode_flops: int
    prefill_flops: int
    row_bytes: int

    @property
    def expert_bytes(self) -> float:
        return self.expert_params * self.weight_bytes


@dataclass(frozen=True, slots=True)
class _AttentionShape:
    """One layer's attention, as the fields of ``ModelShape``."""

    params: int
    decode_flops: int
    prefill_flops: int


def shape_of(name: str, arch: Architecture) -> ModelShape:
    """Of any model that the mesh serves, weights and activations in bfloat16."""
    hidden, num_moe_layers = arch.hidden_size, len(arch.moe_layers)
    latent = arch.attention.latent
    attention = _grouped_query_attention(arch) if latent is None else _latent_attention(arch, latent)
    dense_mlps = (arch.num_layers - num_moe_layers) * 3 * hidden * arch.intermediate_size
    shared = 0 if arch.shared is None else 3 * hidden * arch.shared.width
    return ModelShape(
        name=name,
        num_layers=arch.num_layers,
        num_moe_layers=num_moe_layers,
        num_experts=arch.num_experts,
        top_k=arch.top_k,
        dense_params=arch.num_layers * attention.params
        + dense_mlps
        + num_moe_layers * (shared + hidden * arch.num_experts),
        head_params=arch.vocab_size * hidden,
        expert_params=3 * hidden * arch.moe_intermediate_size,
        weight_bytes=2.0,
        kv_bytes=2 * arch.kv_values_per_token,
        decode_flops=attention.decode_flops,
        prefill_flops=attention.prefill_flops,
        row_bytes=2 * hidden,
    )


def _grouped_query_attention(arch: Architecture) -> _AttentionShape:
    queries = arch.num_heads * arch.head_dim
    params = arch.hidden_size * (2 * queries + 2 * arch.num_kv_heads * arch.head_dim)
    return _AttentionShape(params, 4 * queries, 4 * queries)


def _latent_attention(arch: Architecture, latent: Latent) -> _AttentionShape:
    """Decoding with absorbed projections, prompts with keys and values of each head."""
    hidden, heads, row = arch.hidden_size, arch.num_heads, latent.kv_rank + latent.rope_dim
    queries = heads * arch.head_dim
    query_params = hidden * queries if latent.q_rank is None else (hidden + queries) * latent.q_rank
    params = (
        query_params
        + hidden * row
        + latent.kv_rank * heads * (latent.nope_dim + latent.value_dim)
        + heads * latent.value_dim * hidden
    )
    return _AttentionShape(params, 2 * heads * (row + latent.kv_rank), 2 * heads * (arch.head_dim + latent.value_dim))


def _deepseek_r1() -> ModelShape:
    """Multi-head latent attention: 128 heads, 512 + 64 values of cache a token; decoding with absorbed projections.
    One shared expert, three dense layers. Weights in FP8 as published."""
    hidden, heads, experts, width = 7168, 128, 256, 2048
    attention = hidden * 1536 + 1536 * heads * 192 + hidden * 576 + 512 * heads * 256 + heads * 128 * hidden
    expert = 3 * hidden * width
    return ModelShape(
        name="deepseek-r1",
        num_layers=61,
        num_moe_layers=58,
        num_experts=experts,
        top_k=8,
        dense_params=61 * attention + 3 * 3 * hidden * 18432 + 58 * (expert + hidden * experts),
        head_params=129280 * hidden,
        expert_params=expert,
        weight_bytes=1.0,
        kv_bytes=576 * 2,
        decode_flops=2 * heads * (576 + 512),
        prefill_flops=2 * heads * (192 + 128),
        row_bytes=2 * hidden,
    )


def _grouped_query(
    name: str, *, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, experts: int, top_k: int,
    width: int, vocab: int,
) -> ModelShape:  # fmt: skip
    arch = Architecture(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, rms_norm_eps=1e-6, rope_theta=1e4, attention_bias=False, tie_word_embeddings=False,
        max_model_len=1, intermediate_size=0, num_experts=experts, top_k=top_k, moe_intermediate_size=width,
        norm_topk_prob=True, moe_layers=tuple(range(layers)), eos_token_ids=(),
    )  # fmt: skip
    return shape_of(name, arch)


PRESETS = {
    shape.name: shape
    for shape in (
        _deepseek_r1(),
        _grouped_query(
            "gpt-oss-20b", layers=24, hidden=2880, heads=64, kv_heads=8, head_dim=64, experts=32, top_k=4, width=2880,
            vocab=201088,
        ),
        _grouped_query(
            "qwen3-30b-a3b", layers=48, hidden=2048, heads=32, kv_heads=4, head_dim=128, experts=128, top_k=8,
            width=768, vocab=151936,
        ),
        _grouped_query(
            "mixtral-8x7b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, experts=8, top_k=2,
            width=14336, vocab=32000,
        ),
    )
}  # fmt: skip
"""Sizes from the published checkpoints' config.json."""


def find_shape(model: str) -> ModelShape:
    """A preset's, or that of a checkpoint folder of a family that the mesh serves; only its config.json is read.

    Raises:
        UserError: neither.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model).expanduser()
    if not path.is_dir():
        known = ", ".join(PRESETS)
        raise UserError("--model", f"{model!r} is no known model and no folder", f"give one of {known} or a checkpoint")
    config = read_fields(path / "config.json")
    return shape_of(path.resolve().name, find_family(config).read(config))
