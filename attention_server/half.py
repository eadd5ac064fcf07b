"""The attention half of a rank: the tensors of a step, from the prepared chunks to the sampled tokens.

Dimensions: T tokens of the step, S sequences, R rows of the sequence table, B blocks of a sequence, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.dense import DenseModel
from expertmesh.attention_server.drafting import open_drafter
from expertmesh.attention_server.half_base import HalfBase, num_kv_blocks
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.micro_batch import HostMicroBatch, Inputs
from expertmesh.attention_server.paged import PagedKvCache
from expertmesh.attention_server.sampler import Sampler
from expertmesh.attention_server.splitting import joined, split
from expertmesh.attention_server.step_index import build_step_index
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.config_speculation import SpeculationConfig
from expertmesh.mesh.model.architecture import Architecture
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry

HOST_CACHE_BYTES = 256 * 2**20
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
        micro_batches: int = 1,
    ) -> None:
        """Reads the dense weights and sets the KV cache up.

        ``micro_batches``: 1, or 2 = a step of several sequences is computed as two.

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
        self._micro_batches = micro_batches
        self._chunks: list[Chunk] = []
        self._batches: list[HostMicroBatch] = []
        self._traceparent = ""

    def prepare(self) -> int:
        chunks, changed = self.engine.prepare()
        if changed:
            self._chunks, self._traceparent = chunks, self._due_trace(chunks)
            self._batches = self._built(chunks)
        return sum([batch.num_tokens for batch in self._batches])

    def traceparent(self) -> str:
        return self._traceparent

    @property
    def first_tokens(self) -> int:
        return self._batches[0].num_tokens if len(self._batches) > 1 else 0

    @property
    def micro_batches(self) -> Sequence[HostMicroBatch]:
        return self._batches

    def finish(self) -> None:
        batches, self._batches = self._batches, []
        if not batches:
            return
        if self._traceparent:
            self._last_trace_s = self._clock()
        self.engine.complete(self._chunks, joined([batch.finish() for batch in batches]))

    def _built(self, chunks: list[Chunk]) -> list[HostMicroBatch]:
        self._write_table(chunks)
        parts = [self._inputs(part) for part in split(chunks, self._micro_batches)]
        return [HostMicroBatch(part, self._spec, self._model, self._sampler) for part in parts]

    def _inputs(self, chunks: list[Chunk]) -> Inputs:
        sequences = [chunk.sequence for chunk in chunks]
        rows = np.array([sequence.row for sequence in sequences])
        starts = np.array([sequence.num_computed for sequence in sequences])
        counts = np.array([chunk.num_rows for chunk in chunks])
        tokens = np.concatenate([_tokens(chunk) for chunk in chunks])
        positions = np.array([sequence.num_output for sequence in sequences])
        # The rows that are sampled, sequence by sequence: its last token's and its draft's.
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
        return Inputs(
            chunks=chunks,
            num_tokens=len(tokens),
            token_T=torch.from_numpy(tokens),
            context=self._model.context(index),
            sampled_S=None if len(last_tokens) == len(tokens) else torch.from_numpy(last_tokens),
            sampled_rows_S=rows[sequence_S],
            sampled_position_S=positions[sequence_S] + behind_S,
            drafts=drafts if any(drafts) else None,
            next_T=None if self._spec.mtp_layer is None else torch.from_numpy(np.concatenate([*map(_next, chunks)])),
        )


def _tokens(chunk: Chunk) -> np.ndarray:
    start = chunk.sequence.num_computed
    tokens = chunk.sequence.tokens[start : start + chunk.count]
    return np.concatenate([tokens, np.array(chunk.draft, np.int64)]) if chunk.draft else tokens


def _next(chunk: Chunk) -> np.ndarray:
    """The token after each row; what follows a sequence's last token nobody knows yet."""
    start = chunk.sequence.num_computed + 1
    return np.concatenate([chunk.sequence.tokens[start : start + chunk.count], np.zeros(len(chunk.draft), np.int64)])


def _kv_layout(arch: Architecture) -> dict[str, Any]:
    """The sizes that ``PagedKvCache`` takes from a model."""
    latent = arch.attention.latent
    if latent is None:
        return {"num_kv_heads": arch.num_kv_heads, "head_dim": arch.head_dim, "shared": False}
    return {"num_kv_heads": 1, "head_dim": latent.kv_rank + latent.rope_dim, "shared": True}
