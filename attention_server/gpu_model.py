"""A model without its routed experts on a GPU: the same as ``dense``, in as few launches as it takes.

The kernels know plain grouped-query attention, with or without the norm of each head, and gates that score with softmax
or sigmoid; ``check_supported`` says what a model has beyond that.

A layer takes the residual stream and what the layer before has to add to it; adding and norm are one kernel. Whatever
a method enqueues can be captured into a CUDA graph.

Dimensions: T tokens, H hidden size, E experts, K experts a token, V vocabulary, C all heads, D head size, N positions
of the KV cache, L positions a sequence may have, W blocks that a block table names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from expertmesh.attention_server.grouped_query import join_qkv
from expertmesh.attention_server.rope import Rotations, pair_features
from expertmesh.kernels.embed import embed
from expertmesh.kernels.few_rows import product
from expertmesh.kernels.gate import Gate, route
from expertmesh.kernels.norm import add_rms_norm
from expertmesh.kernels.paged_decode import DecodePlan, paged_decode_attention
from expertmesh.kernels.paged_prefill import paged_prefill_attention
from expertmesh.kernels.rope_append import rope_append
from expertmesh.mesh.device_routing import DeviceRouting
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.architecture import AttentionVariant, ExpertVariant, Multipliers
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec

LEAST_HEAD_DIM = 16
"""The tensor cores multiply no narrower matrices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMlp:
    """``down(silu(gate(x)) · up(x))``, times the sigmoid of a logit where there is a ``router``."""

    gate_up_FH: torch.Tensor
    down_HI: torch.Tensor
    router_1H: torch.Tensor | None

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        gate_TM, up_TM = F.linear(x_TH, self.gate_up_FH).chunk(2, dim=-1)
        out_TH = F.linear(F.silu(gate_TM) * up_TM, self.down_HI)
        return out_TH if self.router_1H is None else out_TH * F.linear(x_TH, self.router_1H).sigmoid()


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLayer:
    """Weights of a decoder layer: a MoE layer has ``router_EH`` and perhaps ``shared`` experts, a dense one ``mlp``."""

    input_norm_H: torch.Tensor
    qkv_CH: torch.Tensor
    qkv_bias_C: torch.Tensor | None
    qk_norm_CD: torch.Tensor | None
    o_HC: torch.Tensor
    o_bias_H: torch.Tensor | None
    post_attention_norm_H: torch.Tensor
    router_EH: torch.Tensor | None
    correction_E: torch.Tensor | None
    shared: GpuMlp | None
    mlp: GpuMlp | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuContext:
    """What all layers of a step share, all on the device.

    The first ``num_decodes`` tokens are sequences with one token each, ``length_S`` positions long with it (0 = padding
    or a chunk's); the others belong to chunks, cut into ``pieces_C4`` (see ``paged_prefill``). ``table_SW``: the
    sequences' block tables. ``place_T``: rows of the KV cache, -1 = padding. ``row_T``: rows of ``last_R``; ``token_T``
    -1 = the token there. ``num_tokens`` int32 [1]: tokens that are not padding; ``is_padded``: there may be others.
    ``micro_batch``: 0, or 1 for the second of a step.
    """

    token_T: torch.Tensor
    row_T: torch.Tensor
    position_T: torch.Tensor
    place_T: torch.Tensor
    length_S: torch.Tensor
    table_SW: torch.Tensor
    num_decodes: int
    pieces_C4: torch.Tensor | None
    num_tokens: torch.Tensor
    is_padded: bool
    micro_batch: int = 0


class GpuKvCache:
    """Keys and values of all layers, [N, 2K, D] each: a position's keys before its values."""

    def __init__(self, spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device) -> None:
        shape = (spec.num_layers, num_blocks * block_size, 2 * spec.num_kv_heads, spec.head_dim)
        self._cache_LNKD = torch.empty(shape, dtype=spec.dtype, device=device)
        # Made once: what slicing costs the host, a step that it enqueues layer by layer waits for.
        by_block = [layer_NKD.view(-1, block_size, *shape[2:]) for layer_NKD in self.layers]
        self._positions = [_split_heads(layer_NKD, spec.num_kv_heads) for layer_NKD in self.layers]
        self._blocks = [_split_heads(layer_BPKD, spec.num_kv_heads) for layer_BPKD in by_block]

    @property
    def layers(self) -> Sequence[torch.Tensor]:
        """[N, 2K, D] of each layer."""
        return self._cache_LNKD.unbind()

    def positions(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values by position, [N, K, D] each."""
        return self._positions[layer]

    def blocks(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values by block, [B, P, K, D] each."""
        return self._blocks[layer]


def _split_heads(cache: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer whose second to last dimension has the heads of both."""
    return cache[..., :num_kv_heads, :], cache[..., num_kv_heads:, :]


class GpuModel:
    """The dense part of a model on a device. Belongs to one stream."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        device: torch.device,
        *,
        num_rows: int,
        max_decodes: int,
        micro_batches: int = 1,
    ) -> None:
        """Reads the dense weights.

        Args:
            num_rows: of the sequence table; ``last_R`` has one more, for padding.
            max_decodes: sequences of a step with one token each.
            micro_batches: that a step may have, in turns.

        Raises:
            UserError: a tensor is missing or has another shape.
        """
        self._spec = spec
        tensors = checkpoint.model_tensors(spec)
        self._embed_VH = tensors["embed"].to(device)
        self._norm_H = tensors["norm"].to(device)
        self._lm_head_VH = tensors["lm_head"].to(device) if "lm_head" in tensors else self._embed_VH
        self._layers = [_load_layer(spec, checkpoint.layer_tensors(spec, n), device) for n in range(spec.num_layers)]
        rotation_LR = Rotations(spec)(torch.arange(spec.max_model_len))
        self._cos_LR = rotation_LR.real.contiguous().to(device)
        self._sin_LR = rotation_LR.imag.contiguous().to(device)
        self._gate = Gate(
            top_k=spec.top_k,
            scoring=spec.gate.scoring,
            renormalizes=spec.norm_topk_prob,
            scale=spec.gate.scale,
            num_groups=spec.gate.num_groups,
            top_groups=spec.gate.top_groups,
        )
        self.last_R = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self._plans = [
            DecodePlan(
                max_seqs=max_decodes,
                num_heads=spec.num_heads,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                device=device,
            )
            for _ in range(micro_batches)
        ]

    def begin(self, context: GpuContext) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream x[T, H] of a step's tokens, and zeros to add to it.

        Its last launches do not overlap with those before: whatever follows finds the plan and all of the context.
        """
        if context.num_decodes:
            self._plans[context.micro_batch].update(context.length_S)
        x_TH = embed(context.token_T, context.row_T, self.last_R, self._embed_VH)
        return x_TH, torch.zeros_like(x_TH)

    def attention(
        self,
        layer: int,
        delta_TH: torch.Tensor,
        residual_TH: torch.Tensor,
        context: GpuContext,
        cache: GpuKvCache,
    ) -> torch.Tensor:
        """Add ``delta`` and the layer's attention to the residual stream; returns the normed input of what follows."""
        spec, weights = self._spec, self._layers[layer]
        eps = spec.rms_norm_eps
        normed_TH = add_rms_norm(delta_TH, residual_TH, weights.input_norm_H, eps)
        qkv_TC = product(normed_TH, weights.qkv_CH, weights.qkv_bias_C)
        q_THD = rope_append(
            qkv_TC.view(*qkv_TC.shape[:-1], -1, spec.head_dim),
            weights.qk_norm_CD,
            eps,
            self._cos_LR,
            self._sin_LR,
            context.position_T,
            context.place_T,
            *cache.positions(layer),
        )
        answer_TC = self._attend(q_THD, layer, context, cache).flatten(1)
        out_TH = product(answer_TC, weights.o_HC, weights.o_bias_H)
        return add_rms_norm(out_TH, residual_TH, weights.post_attention_norm_H, eps)

    def _attend(self, q_THD: torch.Tensor, layer: int, context: GpuContext, cache: GpuKvCache) -> torch.Tensor:
        key_BPKD, value_BPKD = cache.blocks(layer)
        decodes = context.num_decodes
        answer_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if decodes:
            paged_decode_attention(
                q_THD[:decodes],
                key_BPKD,
                value_BPKD,
                context.table_SW,
                context.length_S,
                plan=self._plans[context.micro_batch],
                plan_is_old=True,
                out_SHD=answer_THD[:decodes],
            )
        if context.pieces_C4 is not None:
            if context.is_padded and decodes < len(answer_THD):
                answer_THD[decodes:].zero_()  # what memory holds may be no number
            paged_prefill_attention(q_THD, key_BPKD, value_BPKD, context.table_SW, context.pieces_C4, answer_THD)
        return answer_THD

    def route(self, layer: int, normed_TH: torch.Tensor, context: GpuContext, routing: DeviceRouting) -> Routes:
        """Where the tokens of a MoE layer go; counted in ``routing``."""
        weights = self._layers[layer]
        assert weights.router_EH is not None, f"layer {layer} has no experts"
        routed = route(
            product(normed_TH.to(weights.router_EH.dtype), weights.router_EH),
            self._gate,
            routing.tables(layer),
            bias_E=weights.correction_E,
            num_tokens=context.num_tokens,
            prices=routing.prices(layer, goes_on=context.micro_batch > 0),
            totals=routing.totals(layer),
        )
        return Routes(routed.expert_TK, routed.weight_TK, routed.slot_TK)

    def shared_output(self, layer: int, normed_TH: torch.Tensor) -> torch.Tensor | None:
        """What the layer's shared experts answer, [T, H]; None = none."""
        shared = self._layers[layer].shared
        return None if shared is None else shared(normed_TH)

    def dense_mlp(self, layer: int, normed_TH: torch.Tensor) -> torch.Tensor:
        """What a dense layer's MLP adds to the residual stream."""
        mlp = self._layers[layer].mlp
        assert mlp is not None, f"layer {layer} has no dense MLP"
        return mlp(normed_TH)

    def logits(
        self, delta_TH: torch.Tensor, residual_TH: torch.Tensor, last_S: torch.Tensor | None, out_SV: torch.Tensor
    ) -> None:
        """Logits of the tokens ``last_S``, None = all, into ``out_SV``, in the model's dtype."""
        if last_S is not None:
            delta_TH, residual_TH = delta_TH.index_select(0, last_S), residual_TH.index_select(0, last_S)
        normed_SH = add_rms_norm(delta_TH, residual_TH, self._norm_H, self._spec.rms_norm_eps)
        torch.mm(normed_SH, self._lm_head_VH.T, out=out_SV)


def _load_layer(spec: ModelSpec, parts: Mapping[str, torch.Tensor], device: torch.device) -> GpuLayer:
    router_EH = parts.get("router")
    if router_EH is not None and spec.gate.float32:
        router_EH = router_EH.float()

    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    def mlp(kind: str) -> GpuMlp | None:
        if f"{kind}gate_proj" not in parts:
            return None
        gate_up_FH = torch.cat([parts[f"{kind}gate_proj"], parts[f"{kind}up_proj"]]).to(device)
        router_1H = parts.get(f"{kind}router") if kind else None
        return GpuMlp(gate_up_FH=gate_up_FH, down_HI=parts[f"{kind}down_proj"].to(device), router_1H=there(router_1H))

    return GpuLayer(
        input_norm_H=parts["input_norm"].to(device),
        qkv_CH=join_qkv(parts, "proj", spec).to(device),
        qkv_bias_C=there(join_qkv(parts, "bias", spec) if "q_bias" in parts else None),
        qk_norm_CD=there(_qk_norm(spec, parts)),
        o_HC=parts["o_proj"].to(device),
        o_bias_H=there(parts.get("o_bias")),
        post_attention_norm_H=parts["post_attention_norm"].to(device),
        router_EH=there(router_EH),
        correction_E=None if "router_correction" not in parts else parts["router_correction"].float().to(device),
        shared=mlp("shared_"),
        mlp=mlp(""),
    )


def _qk_norm(spec: ModelSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """A row for each query and key head."""
    if spec.attention.qk_norm == "none":
        return None
    q_D, k_D = (pair_features(parts[f"{name}_norm"], spec.head_dim, spec.rope) for name in "qk")
    return torch.cat([q_D.expand(spec.num_heads, -1), k_D.expand(spec.num_kv_heads, -1)])


def check_supported(spec: ModelSpec) -> None:
    """Raises: UserError: the model has a part that only CPU ranks know."""
    gate = spec.gate
    lacking = {
        "attention": replace(spec.attention, qk_norm="head") != AttentionVariant()
        or spec.attention.qk_norm not in ("head", "none"),
        "gate": gate.bias or gate.scales_input or (gate.num_groups > 1 and gate.group_score != "top2"),
        "experts": spec.expert != ExpertVariant(),
        "multipliers": spec.multipliers != Multipliers(),
        "head_dim": spec.head_dim < LEAST_HEAD_DIM or spec.head_dim & (spec.head_dim - 1) != 0,
    }
    if any(lacking.values()):
        parts = ", ".join(part for part, lacks in lacking.items() if lacks)
        raise UserError(
            "device", f"is cuda, and {spec.name} ({spec.family}) has {parts} of a kind that GPU ranks do not compute",
            "set device to cpu, or serve another model",
        )  # fmt: skip
