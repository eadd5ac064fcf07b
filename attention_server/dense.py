"""Qwen3-MoE without its routed experts: embedding, attention, norms, dense MLPs, gate, LM head.

Source: transformers' ``modeling_qwen3_moe.py``. Dimensions: T tokens, H hidden size, E experts, K experts a token,
V vocabulary, D head size, C all heads of a projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from expertmesh.attention_server.host import MAX_TOKENS, HostLayer
from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.paged import PagedKvCache, StepIndex
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """Weights of one decoder layer; a MoE layer has ``router``, a dense one ``gate_up`` and ``down``."""

    input_norm_H: torch.Tensor
    qkv: Linear
    qk_norm_CD: torch.Tensor  # a row for each query and key head
    o: Linear
    post_attention_norm_H: torch.Tensor
    router_EH: torch.Tensor | None
    gate_up: Linear | None
    down: Linear | None
    host: HostLayer | None


@dataclass(frozen=True, slots=True)
class StepContext:
    """What all layers of a step share: ``rotation_T1R`` complex64 [T, 1, D/2] turns the tokens' queries and keys.

    ``rotation_TD``: the same as cosine and sine side by side.
    """

    index: StepIndex
    rotation_T1R: torch.Tensor
    rotation_TD: np.ndarray


class DenseModel:
    """The dense part of a model. Not thread-safe; the residual stream passes through its methods."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, kv_cache: PagedKvCache) -> None:
        """Reads the dense weights.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        self._spec = spec
        self._kv_cache = kv_cache
        tensors = checkpoint.model_tensors(spec)
        self._embed_VH = tensors["embed"]
        self._norm_H = tensors["norm"]
        self._lm_head = Linear(tensors.get("lm_head", self._embed_VH))
        self._layers = [
            _load_layer(spec, checkpoint.layer_tensors(spec, layer), kv_cache.layer(layer))
            for layer in range(spec.num_layers)
        ]
        self._rotation_PR = _rotations(spec)
        self._eps = torch.tensor(spec.rms_norm_eps)

    @property
    def max_compiled_tokens(self) -> int:
        """Steps of one token a sequence go through the compiled kernels up to so many; 0 = never."""
        return MAX_TOKENS if all(layer.host is not None for layer in self._layers) else 0

    def context(self, index: StepIndex) -> StepContext:
        rotation_TR = self._rotation_PR.index_select(0, index.position_T)
        rotation_TD = torch.view_as_real(rotation_TR).view(len(rotation_TR), -1).numpy()
        return StepContext(index, rotation_TR.unsqueeze(1), rotation_TD)

    def embed(self, token_T: torch.Tensor) -> torch.Tensor:
        """The residual stream x[T, H] of int64 token ids, in memory of its own."""
        return self._embed_VH.index_select(0, token_T)

    def attention(self, layer: int, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The residual stream after the layer's attention; in x's memory or in new."""
        spec, weights = self._spec, self._layers[layer]
        if context.index.tokens is not None:
            assert weights.host is not None, "the step was built for the compiled kernels"
            weights.host.attend(x_TH, context.rotation_TD, context.index.tokens, spec.rms_norm_eps)
            return x_TH
        normed_TH = self._rms_norm(x_TH, weights.input_norm_H)
        qkv_THD = weights.qkv(normed_TH).view(x_TH.shape[0], -1, spec.head_dim)
        self._norm_and_rotate(qkv_THD[:, : -spec.num_kv_heads], weights.qk_norm_CD, context.rotation_T1R)
        answer_TC = self._kv_cache.attend(layer, qkv_THD, context.index)
        return weights.o(answer_TC).add_(x_TH)

    def routed_input(self, layer: int, x_TH: torch.Tensor, *, compiled: bool = True) -> tuple[torch.Tensor, Routes]:
        """Input of a MoE layer's experts and where each token goes, as transformers' ``Qwen3MoeTopKRouter``.

        ``compiled``: through the compiled kernel where it serves.
        """
        weights = self._layers[layer]
        assert weights.router_EH is not None, f"layer {layer} has no experts"
        if compiled and weights.host is not None and x_TH.shape[0] <= MAX_TOKENS:
            return weights.host.gate(
                x_TH, self._spec.top_k, normalise=self._spec.norm_topk_prob, epsilon=self._spec.rms_norm_eps
            )
        normed_TH = self._rms_norm(x_TH, weights.post_attention_norm_H)
        logits_TE = F.linear(normed_TH, weights.router_EH)
        weight_TK, expert_TK = logits_TE.softmax(-1, dtype=torch.float32).topk(self._spec.top_k)
        if self._spec.norm_topk_prob:
            weight_TK /= weight_TK.sum(-1, keepdim=True)
        # transformers rounds the weights to the model's dtype.
        return normed_TH, Routes(expert_TK, weight_TK.to(logits_TE.dtype).float())

    def dense_mlp(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        """The residual stream after a dense layer's MLP."""
        weights = self._layers[layer]
        assert weights.gate_up is not None, f"layer {layer} has no dense MLP"
        assert weights.down is not None, f"layer {layer} has no dense MLP"
        normed_TH = self._rms_norm(x_TH, weights.post_attention_norm_H)
        gate_TM, up_TM = weights.gate_up(normed_TH).chunk(2, dim=-1)
        return weights.down(F.silu(gate_TM).mul_(up_TM)).add_(x_TH)

    def logits(self, x_TH: torch.Tensor) -> torch.Tensor:
        """float32 logits [T, V] of rows of the residual stream after the last layer."""
        return self._lm_head(self._rms_norm(x_TH, self._norm_H)).float()

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last dimension in float32, rounded to the dtype before the weight as transformers does."""
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        # A third faster than F.rms_norm, which is a dozen small operations on the CPU.
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (x32 * scale).to(x.dtype).mul_(weight)

    def _norm_and_rotate(self, qk_TCD: torch.Tensor, norm_CD: torch.Tensor, rotation_T1R: torch.Tensor) -> None:
        """QK-norm and rotary embedding in place; a head's features are pairs (see ``_pair_features``)."""
        qk32_TCD = self._rms_norm(qk_TCD, norm_CD).float()
        _as_complex(qk32_TCD).mul_(rotation_T1R)
        qk_TCD.copy_(qk32_TCD)


def _as_complex(x_TCD: torch.Tensor) -> torch.Tensor:
    """Pairs of features as complex numbers, sharing memory: [T, C, D/2]."""
    return torch.view_as_complex(x_TCD.view(*x_TCD.shape[:2], -1, 2))


def _pair_features(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the features of each head from (0, D/2), (1, D/2 + 1) ... apart to side by side.

    transformers rotates feature i with feature i + D/2. Scores do not change when queries and keys are reordered
    alike, and with partners side by side the rotation is one complex product.
    """
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _rotations(spec: ModelSpec) -> torch.Tensor:
    """exp(i·position·frequency), complex64 [max_model_len, D/2], in float32 as transformers computes it."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequency = 1.0 / spec.rope_theta**exponent
    angle_PR = torch.arange(spec.max_model_len).float()[:, None] * frequency
    return torch.complex(angle_PR.cos(), angle_PR.sin())


def _join_qkv(parts: Mapping[str, torch.Tensor], kind: str, head_dim: int) -> torch.Tensor:
    """The query, key and value projections' weights or biases as one, in our order of features."""
    q, k = (_pair_features(parts[f"{name}_{kind}"], head_dim) for name in "qk")
    return torch.cat([q, k, parts[f"v_{kind}"]])


def _load_layer(spec: ModelSpec, parts: Mapping[str, torch.Tensor], cache_NKD: torch.Tensor) -> Layer:
    dim = spec.head_dim
    q_norm_D, k_norm_D = _pair_features(parts["q_norm"], dim), _pair_features(parts["k_norm"], dim)
    is_dense = "gate_proj" in parts
    qkv = Linear(_join_qkv(parts, "proj", dim), _join_qkv(parts, "bias", dim) if spec.attention_bias else None)
    o = Linear(parts["o_proj"], parts.get("o_bias"))
    qk_norm_CD = torch.cat([q_norm_D.expand(spec.num_heads, dim), k_norm_D.expand(spec.num_kv_heads, dim)])
    return Layer(
        input_norm_H=parts["input_norm"],
        qkv=qkv,
        qk_norm_CD=qk_norm_CD,
        o=o,
        post_attention_norm_H=parts["post_attention_norm"],
        router_EH=parts.get("router"),
        gate_up=Linear(torch.cat([parts["gate_proj"], parts["up_proj"]])) if is_dense else None,
        down=Linear(parts["down_proj"]) if is_dense else None,
        host=HostLayer.of(
            input_norm_H=parts["input_norm"],
            qkv=qkv,
            qk_norm_CD=qk_norm_CD,
            cache_NKD=cache_NKD,
            output=o,
            post_attention_norm_H=parts["post_attention_norm"],
            router_EH=parts.get("router"),
        ),
    )
