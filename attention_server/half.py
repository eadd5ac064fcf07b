"""The attention half of a rank: the tensors of a step, from the prepared chunks to the sampled tokens.

Dimensions: T tokens of the step, S sequences, R rows of the sequence table, B blocks of a sequence, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.attention_server.context import StepContext
from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.drafting import Draft, open_drafter
from expertmesh.attention_server.engine import no_samples
from expertmesh.attention_server.half_base import HalfBase, num_kv_blocks
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.paged import PagedKvCache, build_step_index
from expertmesh.attention_server.sampler import Sampled, Sampler
from expertmesh.attention_server.scheduler import Chunk
from expertmesh.attention_server.verification import Verified, prefixes, verify
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry

HOST_CACHE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Step:
    """The prepared batch as tensors. ``sampled_S`` indexes the tokens of T whose logits are needed, None = all.

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
    traceparent: str


OFF = SpeculationConfig()


class ServingHalf(HalfBase):
    """Implements ``mesh.halves.AttentionHalf``.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: AttentionConfig,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        telemetry: Telemetry,
        *,
        step_sample_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        speculation: SpeculationConfig = OFF,
    ) -> None:
        """Reads the dense weights and sets the KV cache up.

        Raises:
            UserError: a tensor is missing or has another shape, or the KV cache is too small for two blocks.
        """
        num_bytes = HOST_CACHE_BYTES if config.kv_cache_bytes is None else config.kv_cache_bytes
        num_blocks = num_kv_blocks(config, spec, num_bytes, "attention.kv_cache_bytes")
        cache = PagedKvCache(
            num_layers=len(spec.layers),
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=spec.dtype,
            **_kv_layout(spec),
        )
        self._model = DenseModel(spec, checkpoint, cache)
        self._max_compiled_tokens = self._model.max_compiled_tokens
        self._spans = {span for span in spec.attention.spans if span is not None}
        super().__init__(
            config,
            spec,
            telemetry,
            Sampler(spec.vocab_size, config.max_num_seqs),
            num_blocks,
            step_sample_interval_s=step_sample_interval_s,
            clock=clock,
            drafter=open_drafter(speculation),
        )
        if config.enable_prefix_caching:
            self.block_memory = BlockMemory(cache.layers, config.block_size)
        self._step: Step | None = None
        self._x_TH = torch.empty(0)
        self._shared_TH: torch.Tensor | None = None
        self._verified: Verified | None = None

    def prepare(self) -> int:
        chunks, changed = self.engine.prepare()
        if changed:
            self._step = self._build_step(chunks) if chunks else None
        return self._step.num_tokens if self._step is not None else 0

    def traceparent(self) -> str:
        return self._step.traceparent if self._step is not None else ""

    def begin(self) -> None:
        if self._step is not None:
            self._x_TH = self._model.embed(self._step.token_T)
            self._advance(0)

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        if self._step is None:
            return self._nothing()
        if layer == self._spec.mtp_layer:
            self._enter_mtp(layer, self._step)
        return self._model.routed_input(layer, self._x_TH)

    def while_dispatched(self, layer: int) -> None:
        if self._step is not None:
            self._shared_TH = self._model.shared_output(layer)

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        if self._step is not None:
            if self._shared_TH is not None:
                self._model.add(self._x_TH, self._shared_TH)
            self._model.add(self._x_TH, out_TH)
            if layer != self._spec.mtp_layer:
                self._advance(layer + 1)

    def finish(self) -> None:
        step = self._step
        if step is None:
            return
        if self._spec.mtp_layer is None:
            verified = self._verify(step, self._model.hidden(_pick(self._x_TH, step.sampled_S)))
        else:
            assert self._verified is not None, "the layer of multi-token prediction comes before the end of a step"
            verified = self._verified
            self._propose(step, verified)
        self._sampler.accept(step.sampled_rows_S[verified.kept], verified.sampled.tokens)
        self._finish(step, verified.sampled)

    def _verify(self, step: Step, hidden_SH: torch.Tensor) -> Verified:
        """The tokens of every sequence, those of its draft that were right among them; changes nothing."""
        if not len(step.sampled_rows_S):
            return verify(no_samples(), None)
        before = None if step.drafts is None else prefixes(step.drafts)
        logits_SV = self._model.logits(hidden_SH)
        chosen = self._sampler.choose(logits_SV, step.sampled_rows_S, step.sampled_position_S, before)
        return verify(chosen, step.drafts)

    def _enter_mtp(self, layer: int, step: Step) -> None:
        """From the model's last layer into the one of multi-token prediction, which needs the tokens of this step."""
        hidden_TH = self._model.hidden(self._x_TH)
        verified = self._verified = self._verify(step, _pick(hidden_TH, step.sampled_S))
        assert step.next_T is not None, "steps are built for the layer"
        next_T, chosen_S = step.next_T.clone(), torch.from_numpy(verified.chosen_S)
        if step.sampled_S is None:
            next_T = chosen_S
        else:
            next_T.index_copy_(0, step.sampled_S, chosen_S)
        x_TH = self._model.mtp_input(next_T, hidden_TH)
        self._x_TH = self._model.attention(layer, x_TH, step.context)

    def _propose(self, step: Step, verified: Verified) -> None:
        """Note for every sequence what may follow the tokens of this step, sampled as its next token will be."""
        last_C = verified.last_C
        if not len(last_C):
            return
        row_C = torch.from_numpy(last_C) if step.sampled_S is None else step.sampled_S[torch.from_numpy(last_C)]
        logits_CV = self._model.logits(self._model.mtp_hidden(self._x_TH.index_select(0, row_C)))
        tokens_C = verified.tokens_C
        chosen = self._sampler.choose(
            logits_CV, step.sampled_rows_S[last_C], step.sampled_position_S[last_C] + 1, tokens_C
        )
        completing = [chunk.sequence for chunk in step.chunks if chunk.completes]
        for sequence, token, tokens in zip(completing, chosen.tokens.tolist(), tokens_C, strict=True):
            sequence.proposal, sequence.proposal_at = (token,), sequence.num_tokens + len(tokens)

    def _finish(self, step: Step, sampled: Sampled) -> None:
        self._step = self._verified = None
        if step.traceparent:
            self._last_trace_s = self._clock()
        self.engine.complete(step.chunks, sampled)

    def _advance(self, layer: int) -> None:
        """Attention and dense MLPs from a layer up to the next MoE layer's attention, inclusive, or the end."""
        assert self._step is not None
        context = self._step.context
        while layer < self._spec.num_layers:
            self._x_TH = self._model.attention(layer, self._x_TH, context)
            if layer in self._spec.moe_layers:
                return
            self._x_TH = self._model.dense_mlp(layer, self._x_TH)
            layer += 1

    def _build_step(self, chunks: list[Chunk]) -> Step:
        sequences = [chunk.sequence for chunk in chunks]
        self._write_table(chunks)
        rows = np.array([sequence.row for sequence in sequences])
        starts = np.array([sequence.num_computed for sequence in sequences])
        counts = np.array([chunk.num_rows for chunk in chunks])
        tokens = np.concatenate([_tokens(chunk) for chunk in chunks])
        positions = np.array([sequence.num_output for sequence in sequences])
        # The rows of the step that are sampled, sequence by sequence: its last token's and its draft's.
        num_sampled = np.array([len(chunk.draft) + 1 if chunk.completes else 0 for chunk in chunks])
        sequence_S = np.repeat(np.arange(len(chunks)), num_sampled)
        behind_S = np.arange(len(sequence_S)) - (np.cumsum(num_sampled) - num_sampled)[sequence_S]
        last_tokens = (np.cumsum(counts) - num_sampled)[sequence_S] + behind_S
        drafts = [chunk.draft for chunk in chunks if chunk.completes]
        index = build_step_index(
            starts,
            counts,
            self._blocks_RB[rows],
            block_size=self._block_size,
            dtype=self._spec.dtype,
            max_compiled_tokens=self._max_compiled_tokens,
            spans=self._spans,
        )
        return Step(
            chunks=chunks,
            num_tokens=len(tokens),
            token_T=torch.from_numpy(tokens),
            context=self._model.context(index),
            sampled_S=None if len(last_tokens) == len(tokens) else torch.from_numpy(last_tokens),
            sampled_rows_S=rows[sequence_S],
            sampled_position_S=positions[sequence_S] + behind_S,
            drafts=drafts if any(drafts) else None,
            next_T=None if self._spec.mtp_layer is None else torch.from_numpy(np.concatenate([*map(_next, chunks)])),
            traceparent=self._due_trace(chunks),
        )

    def _nothing(self) -> tuple[torch.Tensor, Routes]:
        spec = self._spec
        routes = Routes(torch.empty(0, spec.top_k, dtype=torch.int64), torch.empty(0, spec.top_k))
        return torch.empty(0, spec.hidden_size, dtype=spec.dtype), routes


def _tokens(chunk: Chunk) -> np.ndarray:
    start = chunk.sequence.num_computed
    tokens = chunk.sequence.tokens[start : start + chunk.count]
    return np.concatenate([tokens, np.array(chunk.draft, np.int64)]) if chunk.draft else tokens


def _next(chunk: Chunk) -> np.ndarray:
    """The token after each row; what follows a sequence's last token nobody knows yet."""
    start = chunk.sequence.num_computed + 1
    return np.concatenate([chunk.sequence.tokens[start : start + chunk.count], np.zeros(len(chunk.draft), np.int64)])


def _pick(rows_TH: torch.Tensor, index_S: torch.Tensor | None) -> torch.Tensor:
    return rows_TH if index_S is None else rows_TH.index_select(0, index_S)


def _kv_layout(arch: Architecture) -> dict[str, Any]:
    """The sizes that ``PagedKvCache`` takes from a model."""
    latent = arch.attention.latent
    if latent is None:
        return {"num_kv_heads": arch.num_kv_heads, "head_dim": arch.head_dim, "shared": False}
    return {"num_kv_heads": 1, "head_dim": latent.kv_rank + latent.rope_dim, "shared": True}
