"""The layer of multi-token prediction as a draft (DeepSeek-V3, arXiv:2412.19437, section 2.2).

For position i it takes the model's hidden state h_i and the token after it, t_{i+1}, and predicts t_{i+2}:

    x_i = P · [norm(embedding of t_{i+1}); norm(h_i)]

goes through one decoder layer, a norm and the model's own head. h_i is what the model's head reads, that is behind the
last norm: so engines run published checkpoints. The layer has keys and values of its own for every position, so it runs
on every row of a step, prompts among them, in the step that computes the model's own layers: after the tokens of the
step have been chosen, which the layer needs.

Dimensions: T tokens of the step, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from expertmesh.attention_server.linear import Linear
from expertmesh.attention_server.norm import RmsNorm


class MtpParts:
    """What the layer has beside a decoder layer; ``parts`` as ``mesh.model.mtp`` names them."""

    def __init__(self, parts: Mapping[str, torch.Tensor], epsilon: float) -> None:
        self._embed_norm = RmsNorm(parts["embed_norm"], epsilon)
        self._hidden_norm = RmsNorm(parts["hidden_norm"], epsilon)
        self._project = Linear(parts["project"])
        self.norm = RmsNorm(parts["norm"], epsilon)

    def input(self, embedded_TH: torch.Tensor, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The residual stream [T, H] at the layer's beginning."""
        return self._project(torch.cat([self._embed_norm(embedded_TH), self._hidden_norm(hidden_TH)], dim=1))
