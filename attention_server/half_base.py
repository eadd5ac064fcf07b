"""What the attention halves of both kinds of rank share: the engine, the table of running sequences, tracing.

Dimensions: R rows of the sequence table, B blocks of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.drafting import Drafter
from expertmesh.attention_server.engine import Engine
from expertmesh.attention_server.kv_cache import BlockManager
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.observe import RequestMetrics
from expertmesh.attention_server.request import Sequence
from expertmesh.attention_server.sampler import Sampler
from expertmesh.attention_server.scheduler import Limits
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.telemetry import Telemetry

log = logging.getLogger(__name__)


class HalfBase:
    """The part of an ``AttentionHalf`` that computes nothing."""

    def __init__(
        self,
        config: AttentionConfig,
        spec: ModelSpec,
        telemetry: Telemetry,
        sampler: Sampler,
        num_blocks: int,
        *,
        step_sample_interval_s: float,
        clock: Callable[[], float],
        drafter: Drafter | None = None,
    ) -> None:
        self._spec = spec
        self._block_size = config.block_size
        self._sampler = sampler
        blocks_of_sequence = -(-min(spec.max_model_len, num_blocks * config.block_size) // config.block_size)
        self._blocks_RB = np.zeros((config.max_num_seqs, blocks_of_sequence), np.int64)
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self.block_memory: BlockMemory | None = None
        """Where the KV blocks can be read and written by others than steps; None = they cannot."""
        self.engine = Engine(
            Limits(
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_waiting=config.max_waiting,
            ),
            BlockManager(num_blocks, enable_prefix_caching=config.enable_prefix_caching),
            RequestMetrics(telemetry.metrics),
            clock,
            on_start=self._place,
            on_stop=self._displace,
            drafter=drafter,
        )
        self._clock = clock
        self._trace_interval_s = step_sample_interval_s
        self._last_trace_s = float("-inf")
        log.info("KV cache: %d blocks of %d tokens", num_blocks, config.block_size)

    def set_waker(self, wake: Callable[[], None]) -> None:
        self.engine.set_waker(wake)

    def set_serving(self, serving: bool, reason: str = "") -> None:
        if not serving:
            log.info("not serving: %s", reason or "no view")
        self.engine.set_serving(serving)

    def rides_in(self, traceparent: str) -> None:
        self.engine.link_batch(traceparent)

    def touched_by(self, traceparent: str, what: str) -> None:
        self.engine.link_all(traceparent, what)

    def _write_table(self, chunks: list[Chunk]) -> None:
        """Enter the blocks that the sequences of a batch got since they were last in one."""
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.num_tabled < len(sequence.blocks):
                new = slice(sequence.num_tabled, len(sequence.blocks))
                self._blocks_RB[sequence.row, new] = sequence.blocks[new]
                sequence.num_tabled = len(sequence.blocks)

    def _due_trace(self, chunks: list[Chunk]) -> str:
        sequences = (chunk.sequence for chunk in chunks)
        traced = (sequence.trace.traceparent for sequence in sequences if sequence.trace is not None)
        traceparent = next(traced, "")
        if traceparent and self._clock() - self._last_trace_s >= self._trace_interval_s:
            return traceparent
        return ""

    def _place(self, sequence: Sequence) -> None:
        sequence.row = self._free_rows.pop()
        sequence.num_tabled = 0
        self._sampler.open(sequence.row, sequence)

    def _displace(self, sequence: Sequence) -> None:
        self._sampler.close(sequence.row)
        self._free_rows.append(sequence.row)
        sequence.row = -1


def num_kv_blocks(config: AttentionConfig, spec: ModelSpec, num_bytes: int, key: str) -> int:
    """Blocks of the KV cache.

    Raises:
        UserError: ``num_bytes``, which ``key`` of the configuration decides, hold fewer than two.
    """
    if config.num_kv_blocks is not None:
        return config.num_kv_blocks
    block_bytes = config.block_size * spec.kv_bytes_per_token
    num_blocks = num_bytes // block_bytes
    if num_blocks < 2:
        raise UserError(
            key,
            f"{num_bytes} bytes hold {num_blocks} KV blocks of {block_bytes} bytes",
            f"set it so that there are {2 * block_bytes} bytes or more, or lower attention.block_size",
        )
    return num_blocks
