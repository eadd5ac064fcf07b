"""The compiled path of small steps on the CPU: float32, small weights.

``DenseModel`` asks it first; whatever it does not take goes through torch. Both give the same numbers up to the order
of summation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.step_index import TokenIndex
from expertmesh.kernels.host_decode import Floats, host_attention, host_gate
from expertmesh.mesh.halves import Routes

MAX_TOKENS = 64
"""Beyond it torch's matrix products are as fast."""

_NOTHING = np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class HostLayer:
    """One layer's weights and KV cache as the kernels take them; ``router_EH`` None = the gate is not theirs."""

    input_norm_H: Floats
    qkv_OH: Floats
    qkv_bias_O: Floats
    qk_norm_CD: Floats
    cache_NKD: Floats
    output_HO: Floats
    output_bias_H: Floats
    post_attention_norm_H: Floats
    router_EH: Floats | None

    @classmethod
    def of(
        cls,
        *,
        input_norm_H: torch.Tensor,
        qkv: Linear,
        qk_norm_CD: torch.Tensor,
        cache_NKD: torch.Tensor,
        output: Linear,
        post_attention_norm_H: torch.Tensor,
        router_EH: torch.Tensor | None,
    ) -> HostLayer | None:
        """None where the kernels do not serve the layer."""
        if cache_NKD.dtype != torch.float32 or qkv.plain is None or output.plain is None:
            return None
        return cls(
            input_norm_H=input_norm_H.numpy(),
            qkv_OH=qkv.plain.numpy(),
            qkv_bias_O=_NOTHING if qkv.bias is None else qkv.bias.numpy(),
            qk_norm_CD=qk_norm_CD.contiguous().numpy(),
            cache_NKD=cache_NKD.numpy(),
            output_HO=output.plain.numpy(),
            output_bias_H=_NOTHING if output.bias is None else output.bias.numpy(),
            post_attention_norm_H=post_attention_norm_H.numpy(),
            router_EH=None if router_EH is None else router_EH.numpy(),
        )

    def attend(self, x_TH: torch.Tensor, rotation_TD: Floats, index: TokenIndex, epsilon: float) -> None:
        """Add the layer's attention to x, in place."""
        host_attention(
            x_TH.numpy(),
            self.input_norm_H,
            self.qkv_OH,
            self.qkv_bias_O,
            self.qk_norm_CD,
            rotation_TD,
            self.cache_NKD,
            index.length_T,
            index.blocks_TB,
            index.block_size,
            self.output_HO,
            self.output_bias_H,
            epsilon,
        )

    def gate(self, x_TH: torch.Tensor, top_k: int, *, normalise: bool, epsilon: float) -> tuple[torch.Tensor, Routes]:
        """The experts' input and the gate's choice."""
        assert self.router_EH is not None, "a dense layer has no gate"
        num_tokens = x_TH.shape[0]
        normed_TH = torch.empty_like(x_TH)
        routes = Routes(torch.empty(num_tokens, top_k, dtype=torch.int64), torch.empty(num_tokens, top_k))
        host_gate(
            x_TH.numpy(),
            self.post_attention_norm_H,
            self.router_EH,
            normalise,
            epsilon,
            normed_TH.numpy(),
            routes.expert_TK.numpy(),
            routes.weight_TK.numpy(),
        )
        return normed_TH, routes
