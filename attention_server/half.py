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
from expertmesh.attention_server.paged import PagedKvCache, build_step_index
from expertmesh.attention_server.sampler import Sampled, Sampler
from expertmesh.attention_server.scheduler import Chunk
from expertmesh.attention_server.verification import accept_drafts, prefixes
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
    more for each token of its draft.
    """

    chunks: list[Chunk]
    num_tokens: int
    token_T: torch.Tensor
    context: StepContext
    sampled_S: torch.Tensor | None
    sampled_rows_S: np.ndarray
    sampled_position_S: np.ndarray
    drafts: list[Draft] | None
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
            num_layers=spec.num_layers,
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
        self._step: Step | None = None
        self._x_TH = torch.empty(0)
        self._shared_TH: torch.Tensor | None = None

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
        return self._model.routed_input(layer, self._x_TH)

    def while_dispatched(self, layer: int) -> None:
        if self._step is not None:
            self._shared_TH = self._model.shared_output(layer)

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        if self._step is not None:
            if self._shared_TH is not None:
                self._model.add(self._x_TH, self._shared_TH)
            self._model.add(self._x_TH, out_TH)
            self._advance(layer + 1)

    def finish(self) -> None:
        step = self._step
        if step is None:
            return
        if len(step.sampled_rows_S):
            x_SH = self._x_TH if step.sampled_S is None else self._x_TH.index_select(0, step.sampled_S)
            logits_SV = self._model.logits(x_SH)
            sampled = self._sample(step, logits_SV)
        else:
            sampled = no_samples()
        self._finish(step, sampled)

    def _sample(self, step: Step, logits_SV: torch.Tensor) -> Sampled:
        """The tokens of every sequence, those of its draft that were right among them."""
        rows_S, position_S = step.sampled_rows_S, step.sampled_position_S
        if step.drafts is None:
            return self._sampler.sample(logits_SV, rows_S, position_S)
        chosen = self._sampler.choose(logits_SV, rows_S, position_S, prefixes(step.drafts))
        sampled, kept = accept_drafts(chosen, step.drafts)
        self._sampler.accept(rows_S[kept], sampled.tokens)
        return sampled

    def _finish(self, step: Step, sampled: Sampled) -> None:
        self._step = None
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


def _kv_layout(arch: Architecture) -> dict[str, Any]:
    """The sizes that ``PagedKvCache`` takes from a model."""
    latent = arch.attention.latent
    if latent is None:
        return {"num_kv_heads": arch.num_kv_heads, "head_dim": arch.head_dim, "shared": False}
    return {"num_kv_heads": 1, "head_dim": latent.kv_rank + latent.rope_dim, "shared": True}
