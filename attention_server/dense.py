"""A model without its routed experts: embedding, attention, norms, dense MLPs, gate, shared experts, LM head.

Which variant of each part a layer has is in the spec; see ``mesh.model.architecture``. Dimensions: T tokens, H hidden
size, E experts, K experts a token, V vocabulary, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from expertmesh.attention_server.context import StepContext
from expertmesh.attention_server.gate import choose_experts
from expertmesh.attention_server.grouped_query import GroupedQueryAttention
from expertmesh.attention_server.host import MAX_TOKENS, HostLayer
from expertmesh.attention_server.latent import LatentAttention
from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.mlp import Mlp
from expertmesh.attention_server.mtp import MtpParts
from expertmesh.attention_server.norm import RmsNorm
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.attention_server.rope import Rotations
from expertmesh.attention_server.step_index import StepIndex
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.architecture import GateVariant
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer: a MoE layer has ``router_EH`` and perhaps ``shared`` experts, a dense one ``mlp``."""

    input_norm: RmsNorm
    attention: GroupedQueryAttention | LatentAttention
    post_attention_norm: RmsNorm
    router_EH: torch.Tensor | None
    router_bias_E: torch.Tensor | None
    correction_E: torch.Tensor | None
    shared: Mlp | None
    mlp: Mlp | None
    host: HostLayer | None


class DenseModel:
    """The dense part of a model. Not thread-safe; the residual stream passes through its methods."""

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint, kv_cache: PagedKvCache) -> None:
        """Reads the dense weights.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        self._spec = spec
        tensors = checkpoint.model_tensors(spec)
        self._embed_VH = tensors["embed"]
        self._norm = RmsNorm(tensors["norm"], spec.rms_norm_eps)
        self._lm_head = Linear(tensors.get("lm_head", self._embed_VH))
        self._layers = [
            _load_layer(spec, layer, checkpoint.layer_tensors(spec, layer), kv_cache) for layer in spec.layers
        ]
        self._mtp = None
        if spec.mtp_layer is not None:
            self._mtp = MtpParts(checkpoint.mtp_tensors(spec), spec.rms_norm_eps)
        self._rotations = Rotations(spec)
        self._shared_input_TH = torch.empty(0)

    @property
    def max_compiled_tokens(self) -> int:
        """Steps of one token a sequence go through the compiled kernels up to so many; 0 = never."""
        return MAX_TOKENS if all(layer.host is not None for layer in self._layers) else 0

    def context(self, index: StepIndex) -> StepContext:
        rotation_TR = self._rotations(index.position_T)
        rotation_TD = torch.view_as_real(rotation_TR).view(len(rotation_TR), -1).numpy()
        return StepContext(index, rotation_TR.unsqueeze(1), rotation_TD)

    def embed(self, token_T: torch.Tensor) -> torch.Tensor:
        """The residual stream x[T, H] of int64 token ids, in memory of its own."""
        x_TH = self._embed_VH.index_select(0, token_T)
        factor = self._spec.multipliers.embedding
        return x_TH if factor == 1.0 else x_TH.mul_(factor)

    def attention(self, layer: int, x_TH: torch.Tensor, context: StepContext) -> torch.Tensor:
        """The residual stream after the layer's attention, in x's memory."""
        weights = self._layers[layer]
        if context.index.tokens is not None:
            assert weights.host is not None, "the step was built for the compiled kernels"
            weights.host.attend(x_TH, context.rotation_TD, context.index.tokens, self._spec.rms_norm_eps)
            return x_TH
        return self.add(x_TH, weights.attention(weights.input_norm(x_TH), context))

    def routed_input(self, layer: int, x_TH: torch.Tensor, *, compiled: bool = True) -> tuple[torch.Tensor, Routes]:
        """Input of a MoE layer's experts and where each token goes.

        ``compiled``: through the compiled kernel where it serves.
        """
        weights = self._layers[layer]
        assert weights.router_EH is not None, f"layer {layer} has no experts"
        host = weights.host
        if compiled and host is not None and host.router_EH is not None and x_TH.shape[0] <= MAX_TOKENS:
            normed_TH, routes = host.gate(
                x_TH, self._spec.top_k, normalise=self._spec.norm_topk_prob, epsilon=self._spec.rms_norm_eps
            )
            self._shared_input_TH = normed_TH
            return normed_TH, routes
        normed_TH = self._shared_input_TH = weights.post_attention_norm(x_TH)
        router_input_TH = normed_TH.to(weights.router_EH.dtype)
        logits_TE = F.linear(router_input_TH, weights.router_EH, weights.router_bias_E)
        routes = choose_experts(logits_TE, self._spec, weights.correction_E)
        if self._spec.gate.scales_input:
            scaled_TH = normed_TH * routes.weight_TK.to(normed_TH.dtype)
            return scaled_TH, Routes(routes.expert_TK, torch.ones_like(routes.weight_TK))
        return normed_TH, routes

    def shared_output(self, layer: int) -> torch.Tensor | None:
        """What the layer's shared experts answer to the tokens of the last ``routed_input``, [T, H]; None = none."""
        shared = self._layers[layer].shared
        return None if shared is None else shared(self._shared_input_TH)

    def dense_mlp(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        """The residual stream after a dense layer's MLP, in x's memory."""
        weights = self._layers[layer]
        assert weights.mlp is not None, f"layer {layer} has no dense MLP"
        return self.add(x_TH, weights.mlp(weights.post_attention_norm(x_TH)))

    def add(self, x_TH: torch.Tensor, out_TH: torch.Tensor) -> torch.Tensor:
        """The residual stream with a block's output added, in x's memory."""
        return x_TH.add_(out_TH, alpha=self._spec.multipliers.residual)

    def hidden(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What the head reads of the residual stream after the model's last layer, in new memory."""
        return self._norm(x_TH)

    def mtp_input(self, token_T: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The residual stream before the layer of multi-token prediction, from hidden states and the tokens after."""
        assert self._mtp is not None, "the layer is not served"
        return self._mtp.input(self.embed(token_T), hidden_TH)

    def mtp_hidden(self, x_TH: torch.Tensor) -> torch.Tensor:
        """What the head reads of the residual stream after that layer."""
        assert self._mtp is not None, "the layer is not served"
        return self._mtp.norm(x_TH)

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """float32 logits [T, V]."""
        logits_TV = self._lm_head(hidden_TH).float()
        factor = self._spec.multipliers.logits
        return logits_TV if factor == 1.0 else logits_TV.mul_(factor)


def _load_layer(spec: ModelSpec, layer: int, parts: Mapping[str, torch.Tensor], kv_cache: PagedKvCache) -> Layer:
    kind = GroupedQueryAttention if spec.attention.latent is None else LatentAttention
    attention = kind(spec, layer, parts, kv_cache)
    router_EH = parts.get("router")
    if router_EH is not None and spec.gate.float32:
        router_EH = router_EH.float()
    return Layer(
        input_norm=RmsNorm(parts["input_norm"], spec.rms_norm_eps),
        attention=attention,
        post_attention_norm=RmsNorm(parts["post_attention_norm"], spec.rms_norm_eps),
        router_EH=router_EH,
        router_bias_E=parts.get("router_bias"),
        correction_E=parts.get("router_correction"),
        shared=Mlp(parts, "shared_") if "shared_gate_proj" in parts else None,
        mlp=Mlp(parts) if "gate_proj" in parts else None,
        host=_host_layer(spec, attention, parts, kv_cache.layer(layer)),
    )


def _host_layer(
    spec: ModelSpec,
    attention: GroupedQueryAttention | LatentAttention,
    parts: Mapping[str, torch.Tensor],
    cache_NKD: torch.Tensor,
) -> HostLayer | None:
    """The compiled kernels know attention with the norm of heads alone, and the plain softmax gate."""
    if isinstance(attention, LatentAttention) or attention.qk_norm_CD is None or spec.multipliers.residual != 1.0:
        return None
    return HostLayer.of(
        input_norm_H=parts["input_norm"],
        qkv=attention.qkv,
        qk_norm_CD=attention.qk_norm_CD,
        cache_NKD=cache_NKD,
        output=attention.o,
        post_attention_norm_H=parts["post_attention_norm"],
        router_EH=parts.get("router") if spec.gate == GateVariant() else None,
    )
