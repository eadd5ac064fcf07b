"""A micro-batch of a step on the CPU: the tensors of some of its chunks, and their way through the layers.

Dimensions: T tokens of the micro-batch, S sequences, R rows of the sequence table, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.context import StepContext
from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.drafting import Draft
from expertmesh.attention_server.sampler import Sampled, Sampler, no_samples
from expertmesh.attention_server.verification import Verified, prefixes, verify
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Inputs:
    """Prepared chunks as tensors. ``sampled_S`` indexes the tokens of T whose logits are needed, None = all.

    ``drafts``: of each sequence whose next token is sampled; None = nobody has any. S counts a sequence once, and once
    more for each token of its draft. ``next_T``: the token after each of T, where it is known; only for the layer of
    multi-token prediction.
    """

    chunks: list[Chunk]
    num_tokens: int
    token_T: torch.Tensor
    context: StepContext
    sampled_S: torch.Tensor | None
    sampled_rows_S: np.ndarray
    sampled_position_S: np.ndarray
    drafts: list[Draft] | None
    next_T: torch.Tensor | None


class HostMicroBatch:
    """Implements ``mesh.halves.MicroBatch``."""

    def __init__(self, inputs: Inputs, spec: ModelSpec, model: DenseModel, sampler: Sampler) -> None:
        self.inputs = inputs
        self._spec = spec
        self._model = model
        self._sampler = sampler
        self._x_TH = torch.empty(0)
        self._shared_TH: torch.Tensor | None = None
        self._verified: Verified | None = None

    @property
    def num_tokens(self) -> int:
        return self.inputs.num_tokens

    def begin(self) -> None:
        self._x_TH = self._model.embed(self.inputs.token_T)
        self._advance(0)

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        if layer == self._spec.mtp_layer:
            self._enter_mtp(layer)
        return self._model.routed_input(layer, self._x_TH)

    def while_dispatched(self, layer: int) -> None:
        self._shared_TH = self._model.shared_output(layer)

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        if self._shared_TH is not None:
            self._model.add(self._x_TH, self._shared_TH)
        self._model.add(self._x_TH, out_TH)
        if layer != self._spec.mtp_layer:
            self._advance(layer + 1)

    def finish(self) -> Sampled:
        """The tokens of the sequences that have one, in the order of the chunks."""
        if self._spec.mtp_layer is None:
            verified = self._verify(self._model.hidden(_pick(self._x_TH, self.inputs.sampled_S)))
        else:
            assert self._verified is not None, "the layer of multi-token prediction comes before the end of a step"
            verified = self._verified
            self._propose(verified)
        self._sampler.accept(self.inputs.sampled_rows_S[verified.kept], verified.sampled.tokens)
        return verified.sampled

    def _verify(self, hidden_SH: torch.Tensor) -> Verified:
        """The tokens of every sequence, those of its draft that were right among them; changes nothing."""
        inputs = self.inputs
        if not len(inputs.sampled_rows_S):
            return verify(no_samples(), None)
        before = None if inputs.drafts is None else prefixes(inputs.drafts)
        logits_SV = self._model.logits(hidden_SH)
        chosen = self._sampler.choose(logits_SV, inputs.sampled_rows_S, inputs.sampled_position_S, before)
        return verify(chosen, inputs.drafts)

    def _enter_mtp(self, layer: int) -> None:
        """From the model's last layer into the one of multi-token prediction, which needs the tokens of this step."""
        inputs = self.inputs
        hidden_TH = self._model.hidden(self._x_TH)
        verified = self._verified = self._verify(_pick(hidden_TH, inputs.sampled_S))
        assert inputs.next_T is not None, "steps are built for the layer"
        next_T, chosen_S = inputs.next_T.clone(), torch.from_numpy(verified.chosen_S)
        if inputs.sampled_S is None:
            next_T = chosen_S
        else:
            next_T.index_copy_(0, inputs.sampled_S, chosen_S)
        x_TH = self._model.mtp_input(next_T, hidden_TH)
        self._x_TH = self._model.attention(layer, x_TH, inputs.context)

    def _propose(self, verified: Verified) -> None:
        """Note for every sequence what may follow the tokens of this step, sampled as its next token will be."""
        inputs, last_C = self.inputs, verified.last_C
        if not len(last_C):
            return
        row_C = torch.from_numpy(last_C) if inputs.sampled_S is None else inputs.sampled_S[torch.from_numpy(last_C)]
        logits_CV = self._model.logits(self._model.mtp_hidden(self._x_TH.index_select(0, row_C)))
        tokens_C = verified.tokens_C
        chosen = self._sampler.choose(
            logits_CV, inputs.sampled_rows_S[last_C], inputs.sampled_position_S[last_C] + 1, tokens_C
        )
        completing = [chunk.sequence for chunk in inputs.chunks if chunk.completes]
        for sequence, token, tokens in zip(completing, chosen.tokens.tolist(), tokens_C, strict=True):
            sequence.proposal, sequence.proposal_at = (token,), sequence.num_tokens + len(tokens)

    def _advance(self, layer: int) -> None:
        """Attention and dense MLPs from a layer up to the next MoE layer's attention, inclusive, or the end."""
        context = self.inputs.context
        while layer < self._spec.num_layers:
            self._x_TH = self._model.attention(layer, self._x_TH, context)
            if layer in self._spec.moe_layers:
                return
            self._x_TH = self._model.dense_mlp(layer, self._x_TH)
            layer += 1


def _pick(rows_TH: torch.Tensor, index_S: torch.Tensor | None) -> torch.Tensor:
    return rows_TH if index_S is None else rows_TH.index_select(0, index_S)
