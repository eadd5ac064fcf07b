"""What every room may know about a model's sizes, whatever its family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder with routed experts, as ``config.json`` describes it.

    Counts and sizes are in elements. ``intermediate_size`` is the dense MLP's width, ``moe_intermediate_size`` one
    expert's. ``top_k`` experts are chosen for each token in each layer of ``moe_layers`` (ascending); all other layers
    have a dense MLP. ``max_model_len`` bounds prompt + output tokens. ``eos_token_ids`` may be empty.
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
