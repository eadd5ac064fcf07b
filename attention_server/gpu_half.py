"""The attention half of a rank on a GPU: steps are enqueued, and their tokens handed out while the next step runs.

The host is a step ahead of what it knows: while step n runs, step n + 1 is prepared on the assumption that every
sequence goes on, and enqueued; its input tokens are on the device alone. A sequence that step n ended has then one
token too many in step n + 1, which is dropped. The host waits for a step's tokens before it prepares the next one only
where it must: when a sequence would lose its blocks, or asks for options that are applied after the step.

Dimensions: T tokens of the step, Z samples, V vocabulary, H hidden size.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from expertmesh.attention_server.gpu_model import GpuContext, GpuKvCache, GpuModel, check_supported
from expertmesh.attention_server.gpu_sampler import DeviceLogprobs, GpuSampler
from expertmesh.attention_server.gpu_step import HostStep, SampleInputs, StepMemory, build_step
from expertmesh.attention_server.half_base import HalfBase, num_kv_blocks
from expertmesh.attention_server.kv_memory import BlockMemory
from expertmesh.attention_server.sampler import Sampled
from expertmesh.attention_server.scheduler import LaunchedChunk
from expertmesh.kernels.paged_prefill import queries_a_piece
from expertmesh.kernels.sampler import gumbel_argmax
from expertmesh.mesh.config import AttentionConfig
from expertmesh.mesh.device_routing import DeviceRouting
from expertmesh.mesh.graphs import round_up
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.placement import RoutingTables, Topology
from expertmesh.mesh.telemetry import Telemetry

log = logging.getLogger(__name__)

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
    ) -> None:
        """Reads the dense weights, then gives the KV cache its share of what is free on the device.

        Raises:
            UserError: a tensor is missing or has another shape, the KV cache is too small for two blocks, or the model
                has parts that GPU ranks do not compute.
        """
        check_supported(spec)
        self._device = device
        num_samples = round_up(config.max_num_seqs)  # as many as a padded step has
        self._model = GpuModel(spec, checkpoint, device, num_rows=config.max_num_seqs, max_decodes=num_samples)
        self._logits_ZV = torch.empty(num_samples, spec.vocab_size, dtype=spec.dtype, device=device)
        self._token_Z = torch.zeros(num_samples, dtype=torch.int64, device=device)
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
        self._memory = StepMemory(
            max_tokens=max(config.max_num_batched_tokens, num_samples),
            max_seqs=num_samples,
            spare_row=config.max_num_seqs,
            table_width=self._blocks_RB.shape[1],
            queries_a_piece=self._queries_a_piece,
            device=device,
        )
        self._flights: deque[_Flight] = deque()
        self._step: HostStep | None = None
        self._routing: DeviceRouting | None = None
        self._check: Callable[[torch.cuda.Event], None] | None = None
        self._context: GpuContext | None = None
        self._samples: SampleInputs | None = None
        self._delta_TH = self._residual_TH = self._normed_TH = torch.empty(0)
        self._shared_TH: torch.Tensor | None = None

    def bind(self, routing: RoutingTables, topology: Topology, check: Callable[[torch.cuda.Event], None]) -> None:
        while self._flights:
            self.engine.take_back(self._flights.pop().launched)
        self._step = None
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
        if self._step is None and self._flights and not self.engine.can_go_on():
            self._land_all()
        chunks, changed = self.engine.prepare()
        if not chunks and self._flights:
            self._land_all()
            chunks, changed = self.engine.prepare()
        if changed:
            self._step = None
            if chunks:
                self._write_table(chunks)
                self._step = build_step(
                    chunks, self._blocks_RB, self._block_size, self._due_trace(chunks), self._queries_a_piece
                )
        return self._step.num_tokens if self._step is not None else 0

    def traceparent(self) -> str:
        return self._step.traceparent if self._step is not None else ""

    @property
    def is_decode(self) -> bool:
        return self._step is not None and self._step.is_decode

    def stage(self, size: int | None) -> None:
        step = self._step
        assert step is not None, "only a prepared batch is brought to the device"
        temperature_Z, seed_Z = self._gpu_sampler.temperature(step.row_Z), self._gpu_sampler.seed(step.row_Z)
        self._context, self._samples = self._memory.upload(step, temperature_Z, seed_Z, size)

    def stage_nothing(self, size: int) -> None:
        nothing = np.empty(0, np.float32), np.empty(0, np.int64)
        self._context, self._samples = self._memory.upload(None, *nothing, size)

    def stage_chunk_of_nothing(self, size: int) -> None:
        self.stage_nothing(size)
        assert self._context is not None, "it was staged just now"
        assert self._samples is not None, "it was staged just now"
        piece_14 = torch.zeros(1, 4, dtype=torch.int32, device=self._device)  # of no queries
        self._context = replace(self._context, num_decodes=1, pieces_C4=piece_14)
        first_Z = torch.zeros(1, dtype=torch.int32, device=self._device)
        parts = {field.name: getattr(self._samples, field.name)[:1] for field in fields(self._samples)[1:]}
        self._samples = SampleInputs(sampled_Z=first_Z, **parts)

    def begin(self) -> None:
        assert self._context is not None, "a step's inputs are staged before it begins"
        self._delta_TH, self._residual_TH = self._model.begin(self._context)
        self._advance(0)

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        assert self._context is not None, "a step's inputs are staged before it begins"
        return self._normed_TH, self._model.route(layer, self._normed_TH, self._context, self.routing)

    def while_dispatched(self, layer: int) -> None:
        self._shared_TH = self._model.shared_output(layer, self._normed_TH)

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        self._delta_TH = out_TH if self._shared_TH is None else out_TH + self._shared_TH
        self._advance(layer + 1)

    def finish(self) -> None:
        """The step is enqueued: send for its tokens, then hand out those of the step before."""
        step, self._step = self._step, None
        assert step is not None, "a step was enqueued"
        if step.traceparent:
            self._last_trace_s = self._clock()
        special = self._gpu_sampler.special(step.row_Z)
        logprobs = self._choose_special(step, special) if len(special) else None
        tokens_Z, done = self._fetch(len(step.row_Z))
        self._flights.append(_Flight(self.engine.launch(step.chunks), tokens_Z, done, logprobs))
        while len(self._flights) > (0 if len(special) else _AHEAD):
            self._land()

    # -- parts of a step ------------------------------------------------------------------------------------------

    def _advance(self, layer: int) -> None:
        """Attention and dense MLPs from a layer up to the next MoE layer's input, or the end, where sampling is."""
        assert self._context is not None, "a step's inputs are staged before it begins"
        while layer < self._spec.num_layers:
            self._normed_TH = self._model.attention(
                layer, self._delta_TH, self._residual_TH, self._context, self._cache
            )
            if layer in self._spec.moe_layers:
                return
            self._delta_TH = self._model.dense_mlp(layer, self._normed_TH)
            layer += 1
        self._sample()

    def _sample(self) -> None:
        samples = self._samples
        assert samples is not None, "a step's inputs are staged before it begins"
        num_samples = len(samples.row_Z)
        if not num_samples:
            return
        logits_ZV = self._logits_ZV[:num_samples]
        self._model.logits(self._delta_TH, self._residual_TH, samples.sampled_Z, logits_ZV)
        token_Z = gumbel_argmax(logits_ZV, samples.temperature_Z, samples.seed_Z, samples.output_Z)
        self._keep(slice(0, num_samples), samples.row_Z.long(), token_Z)

    def _choose_special(self, step: HostStep, special: np.ndarray) -> DeviceLogprobs | None:
        """Choose again for the sequences whose options the step itself does not know."""
        rows = step.row_Z[special]
        index = torch.from_numpy(special).to(self._device)
        logits_SV = self._logits_ZV[index].float()
        token_S, logprobs = self._gpu_sampler.choose_special(logits_SV, special, rows, step.output_Z[special])
        self._keep(index, torch.from_numpy(rows).to(self._device), token_S)
        return logprobs

    def _keep(self, index: slice | torch.Tensor, row_Z: torch.Tensor, token_Z: torch.Tensor) -> None:
        """For the host, and for the next step."""
        self._token_Z[index] = token_Z
        self._model.last_R[row_Z] = token_Z

    def _fetch(self, num_samples: int) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._device.type != "cuda":
            return self._token_Z[:num_samples].clone(), None
        tokens_Z = torch.empty(num_samples, dtype=torch.int64, pin_memory=True)
        tokens_Z.copy_(self._token_Z[:num_samples], non_blocking=True)
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
