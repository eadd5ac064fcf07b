"""The attention half of a rank on a GPU: steps are enqueued, and their tokens handed out while the next step runs.

The host is a step ahead of what it knows: while step n runs, step n + 1 is prepared on the assumption that every
sequence goes on, and enqueued; its input tokens are on the device alone. A sequence that step n ended has then one
token too many in step n + 1, which is dropped. The host waits for a step's tokens before it prepares the next one only
where it must: when a sequence would lose its blocks, or asks for options that are applied after the step.

Dimensions: Z samples, V vocabulary, S samples of some sequences.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch

from expertmesh.attention_server.chunk import Chunk, LaunchedChunk
from expertmesh.attention_server.gpu_micro_batch import DeviceSamples, GpuMicroBatch
from expertmesh.attention_server.gpu_model import GpuKvCache, GpuModel, check_supported
from expertmesh.attention_server.gpu_sampler import DeviceLogprobs, GpuSampler
from expertmesh.attention_server.gpu_step import StepMemory
from expertmesh.attention_server.half_base import HalfBase, num_kv_blocks
from expertmesh.attention_server.host_step import HostStep, build_step
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.sampler import Sampled
from expertmesh.attention_server.splitting import split
from expertmesh.kernels.paged_prefill import queries_a_piece
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.device_routing import DeviceRouting
from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.padding import PaddedStep, chunk_sizes, round_up
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.telemetry import Telemetry

_AHEAD = 1  # steps that may be under way while the host prepares another one


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way; ``tokens_Z`` is pinned memory that holds its tokens once ``done`` has happened."""

    launched: list[LaunchedChunk]
    tokens_Z: torch.Tensor
    done: torch.cuda.Event | None
    logprobs: DeviceLogprobs | None


class GpuHalf(HalfBase):
    """Implements ``mesh.halves.DeviceAttentionHalf``; on a CPU device too, for tests of everything but the graphs.

    Args:
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: AttentionConfig,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        telemetry: Telemetry,
        device: torch.device,
        *,
        step_sample_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        micro_batches: int = 1,
    ) -> None:
        """Reads the dense weights, then gives the KV cache its share of what is free on the device.

        ``micro_batches``: 1, or 2 = a step of several sequences is computed as two.

        Raises:
            UserError: a tensor is missing or has another shape, the KV cache is too small for two blocks, or the model
                has parts that GPU ranks do not compute.
        """
        check_supported(spec)
        self._device = device
        num_samples = round_up(config.max_num_seqs)  # as many as a padded step has
        self._model = GpuModel(
            spec,
            checkpoint,
            device,
            num_rows=config.max_num_seqs,
            max_decodes=num_samples,
            micro_batches=micro_batches,
        )
        self._samples = DeviceSamples(spec, micro_batches * num_samples, device)
        num_blocks = num_kv_blocks(config, spec, *_cache_bytes(config, device))
        self._cache = GpuKvCache(spec, num_blocks, config.block_size, device)
        self._gpu_sampler = GpuSampler(spec.vocab_size, config.max_num_seqs, device)
        super().__init__(
            config,
            spec,
            telemetry,
            self._gpu_sampler,
            num_blocks,
            step_sample_interval_s=step_sample_interval_s,
            clock=clock,
        )
        if config.enable_prefix_caching:
            self.block_memory = BlockMemory(self._cache.layers, config.block_size)
        self._queries_a_piece = queries_a_piece(spec.num_heads, spec.num_kv_heads)
        self._turns = [
            GpuMicroBatch(
                index,
                spec,
                self._model,
                self._cache,
                StepMemory(
                    max_tokens=max(config.max_num_batched_tokens, num_samples, *chunk_sizes(config)),
                    max_seqs=num_samples,
                    spare_row=config.max_num_seqs,
                    table_width=self._blocks_RB.shape[1],
                    queries_a_piece=self._queries_a_piece,
                    device=device,
                ),
                self._samples,
                index * num_samples,
                lambda: self.routing,
            )
            for index in range(micro_batches)
        ]
        self._flights: deque[_Flight] = deque()
        self._chunks: list[Chunk] = []
        self._steps: list[HostStep] = []
        self._num_staged = 0
        self._routing: DeviceRouting | None = None
        self._check: Callable[[torch.cuda.Event], None] | None = None

    def bind(self, routing: RoutingTables, topology: Topology, check: Callable[[torch.cuda.Event], None]) -> None:
        while self._flights:
            self.engine.take_back(self._flights.pop().launched)
        self._steps = []
        self._check = check
        self._routing = DeviceRouting(
            routing, topology, self._spec.moe_layers, num_experts=self._spec.num_experts, device=self._device
        )

    @property
    def routing(self) -> DeviceRouting:
        assert self._routing is not None, "steps happen in a view"
        return self._routing

    # -- a step, in the order of its calls ------------------------------------------------------------------------

    def prepare(self) -> int:
        if not self._steps and self._flights and not self.engine.can_go_on():
            self._land_all()
        chunks, changed = self.engine.prepare()
        if not chunks and self._flights:
            self._land_all()
            chunks, changed = self.engine.prepare()
        if changed:
            self._chunks, self._steps = chunks, self._built(chunks)
        return sum([step.num_tokens for step in self._steps])

    def _built(self, chunks: list[Chunk]) -> list[HostStep]:
        self._write_table(chunks)
        traceparent = self._due_trace(chunks)
        return [
            build_step(part, self._blocks_RB, self._block_size, traceparent, self._queries_a_piece)
            for part in split(chunks, len(self._turns))
        ]

    def traceparent(self) -> str:
        return self._steps[0].traceparent if self._steps else ""

    @property
    def is_decode(self) -> bool:
        return bool(self._steps) and all(step.is_decode for step in self._steps)

    @property
    def first_tokens(self) -> int:
        return self._steps[0].num_tokens if len(self._steps) > 1 else 0

    @property
    def micro_batches(self) -> Sequence[GpuMicroBatch]:
        return self._turns[: self._num_staged]

    def fits(self, padded: PaddedStep) -> bool:
        return len(self._steps) == 1 and self._turns[0].fits(self._steps[0], padded)

    def stage(self, padded: PaddedStep | None) -> None:
        assert self._steps, "only a prepared batch is brought to the device"
        self._stage(self._steps, padded, len(self._steps) if padded is None else padded.micro_batches)

    def stage_nothing(self, padded: PaddedStep) -> None:
        self._stage([], padded, padded.micro_batches)

    def stage_chunk_of_nothing(self, size: int) -> None:
        self._turns[0].stage_chunk_of_nothing(size, self._gpu_sampler)
        self._num_staged = 1

    def _stage(self, steps: list[HostStep], padded: PaddedStep | None, micro_batches: int) -> None:
        if micro_batches > len(self._turns):
            raise UserError(
                "dataplane.micro_batches",
                f"is {len(self._turns)} here and {micro_batches} on another rank of the view",
                "set it to the same number on all ranks",
            )
        for turn, step in zip_longest(self._turns[:micro_batches], steps):
            turn.stage(step, self._gpu_sampler, padded)
        self._num_staged = micro_batches

    def finish(self) -> None:
        """The step is enqueued: send for its tokens, then hand out those of the step before."""
        steps, self._steps = self._steps, []
        assert steps, "a step was enqueued"
        if steps[0].traceparent:
            self._last_trace_s = self._clock()
        row_Z = np.concatenate([step.row_Z for step in steps])
        special = self._gpu_sampler.special(row_Z)
        logprobs = self._choose_special(steps, row_Z, special) if len(special) else None
        tokens_Z, done = self._fetch([len(step.row_Z) for step in steps])
        self._flights.append(_Flight(self.engine.launch(self._chunks), tokens_Z, done, logprobs))
        while len(self._flights) > (0 if len(special) else _AHEAD):
            self._land()

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _choose_special(self, steps: list[HostStep], row_Z: np.ndarray, special: np.ndarray) -> DeviceLogprobs | None:
        """Choose again for the sequences whose options the step itself does not know."""
        rows = row_Z[special]
        output_Z = np.concatenate([step.output_Z for step in steps])
        places = [
            turn.first_sample + np.arange(len(step.row_Z)) for turn, step in zip(self._turns, steps, strict=False)
        ]
        index = torch.from_numpy(np.concatenate(places)[special]).to(self._device)
        logits_SV = self._samples.logits_ZV[index].float()
        token_S, logprobs = self._gpu_sampler.choose_special(logits_SV, special, rows, output_Z[special])
        self._samples.token_Z[index] = token_S
        self._model.last_R[torch.from_numpy(rows).to(self._device)] = token_S
        return logprobs

    def _fetch(self, num_samples: list[int]) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The tokens of so many samples of each micro-batch, and when they are there."""
        parts = [
            self._samples.token_Z[turn.first_sample : turn.first_sample + count]
            for turn, count in zip(self._turns, num_samples, strict=False)
        ]
        if self._device.type != "cuda":
            return torch.cat(parts), None
        tokens_Z = torch.empty(sum(num_samples), dtype=torch.int64, pin_memory=True)
        for host, part in zip(torch.split(tokens_Z, num_samples), parts, strict=True):
            host.copy_(part, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's
        done.record()
        return tokens_Z, done

    def _land(self) -> None:
        flight = self._flights[0]
        if flight.done is not None:
            assert self._check is not None, "steps happen in a view"
            self._check(flight.done)
        self._flights.popleft()
        logprobs = flight.logprobs.fetch() if flight.logprobs is not None else {}
        self.engine.land(flight.launched, Sampled(flight.tokens_Z.numpy(), logprobs))

    def _land_all(self) -> None:
        while self._flights:
            self._land()


def _cache_bytes(config: AttentionConfig, device: torch.device) -> tuple[int, str]:
    """Bytes for the KV cache, and the key that decides them."""
    if config.kv_cache_bytes is not None or device.type != "cuda":
        return config.kv_cache_bytes or 256 * 2**20, "attention.kv_cache_bytes"
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(config.free_gpu_memory_fraction * free), "attention.free_gpu_memory_fraction"
