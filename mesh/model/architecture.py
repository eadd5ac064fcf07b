"""What every room may know about a model, whatever its family: sizes, and which variant of each part it has.

A variant is a small record beside the others; a model is put together from them. Every default is what Qwen3-MoE has,
so an engine that serves one variant only can compare a record with its default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """All rotary frequencies divided by ``factor``."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3's scaling: low frequencies divided by ``factor``, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071). ``attention_factor`` multiplies cosine and sine; ``truncate`` rounds the range."""

    factor: float
    original_max_len: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary embedding (arXiv:2104.09864) with θ = ``Architecture.rope_theta``.

    ``dim``: how many features of a head rotate, the first ones; None = all. ``interleaved``: feature 2i rotates with
    2i + 1, otherwise i with i + dim/2.
    """

    dim: int | None = None
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Which earlier positions a token sees: the last ``size`` with itself (window), or those of its chunk."""

    kind: Literal["window", "chunk"]
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Temperature:
    """Queries times 1 + ``scale`` · ln(1 + ⌊(position + 1) / floor⌋), in layers without rotary embedding (Llama 4)."""

    scale: float
    floor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """Multi-head latent attention (arXiv:2405.04434): keys and values of all heads come from ``kv_rank`` numbers.

    ``q_rank`` None = queries are not compressed. A query or key head is ``nope_dim`` features without rotary embedding
    and ``rope_dim`` with it, whose key part all heads share; a value head has ``value_dim``.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionVariant:
    """How attention departs from plain grouped-query attention.

    ``qk_norm``: RMS norm of each query and key head, of all heads of a projection as one row, of each head without
    weights after rotation, or none. ``scale`` of the scores, None = 1/√head_dim. ``clip`` bounds queries, keys and
    values. ``spans``: what each layer sees, None = everything before; empty = everything in all layers.
    ``layers_without_rope``. ``sinks``: a learnt logit a head that takes part in the softmax and has no value.
    """

    qk_norm: Literal["head", "row", "l2_rotated", "none"] = "head"
    scale: float | None = None
    clip: float | None = None
    spans: tuple[Span | None, ...] = ()
    layers_without_rope: frozenset[int] = frozenset()
    temperature: Temperature | None = None
    sinks: bool = False
    latent: Latent | None = None

    def span(self, layer: int) -> Span | None:
        return self.spans[layer] if self.spans else None


@dataclass(frozen=True, kw_only=True, slots=True)
class GateVariant:
    """How experts are chosen from the router's logits; ``Architecture.norm_topk_prob``: their weights sum to 1.

    ``scoring`` of all logits. ``correction``: a bias for each expert is added to choose, not to weigh. ``num_groups``
    groups of experts, of which only the ``top_groups`` best may be chosen from, by their best expert or the sum of
    their two best. ``scale`` multiplies the weights. ``bias``: the router's logits have one. ``scales_input``: the
    weight multiplies the expert's input, not its output. ``float32``: logits are computed in it.
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "top2"
    scale: float = 1.0
    bias: bool = False
    scales_input: bool = False
    float32: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertVariant:
    """What a routed expert computes from gate and up: silu(gate) · up.

    With a ``limit``: (up' + 1) · gate' · σ(alpha · gate'), gate' at most the limit and up' within ± the limit
    (gpt-oss). ``biases``: both of an expert's products have one.
    """

    biases: bool = False
    limit: float | None = None
    alpha: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """Shared experts of a MoE layer, as one MLP of so many features; where a family names a ``shared_router``, times
    the sigmoid of its logit.
    """

    width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Multipliers:
    """Factors on embeddings, on what each block adds to the residual stream, and on the logits (Granite)."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with routed experts, as ``config.json`` describes it.

    Counts and sizes are in elements. ``intermediate_size`` is the dense MLP's width, ``moe_intermediate_size`` one
    expert's. ``top_k`` experts are chosen for each token in each layer of ``moe_layers`` (ascending); all other layers
    have a dense MLP. ``max_model_len`` bounds prompt + output tokens. ``eos_token_ids`` may be empty. With latent
    attention ``head_dim`` is a query head's and ``num_kv_heads`` = ``num_heads``. ``mtp_layer``: where the layer of
    multi-token prediction is served it is ``num_layers``, and the last of ``moe_layers``.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    tie_word_embeddings: bool
    max_model_len: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    moe_layers: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    rope: Rope = Rope()
    attention: AttentionVariant = AttentionVariant()
    gate: GateVariant = GateVariant()
    expert: ExpertVariant = ExpertVariant()
    shared: Shared | None = None
    multipliers: Multipliers = Multipliers()
    mtp_layer: int | None = None

    @property
    def layers(self) -> range:
        """All decoder layers that are served."""
        return range(self.num_layers + (self.mtp_layer is not None))

    @property
    def expert_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one expert's tensors: ``gate_up`` [2I, H], ``down`` [H, I] and, with biases, theirs [2I] and [H]."""
        hidden, width = self.hidden_size, self.moe_intermediate_size
        weights: tuple[tuple[int, ...], ...] = ((2 * width, hidden), (hidden, width))
        return (*weights, (2 * width,), (hidden,)) if self.expert.biases else weights

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one layer's KV cache holds for a token."""
        latent = self.attention.latent
        return latent.kv_rank + latent.rope_dim if latent is not None else 2 * self.num_kv_heads * self.head_dim
