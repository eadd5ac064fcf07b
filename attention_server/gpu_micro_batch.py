"""A micro-batch of a step on a GPU: what it computes lies in memory of its own, so that two of them can take turns.

Dimensions: T tokens of the micro-batch, Z samples, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from expertmesh.attention_server.gpu_model import GpuContext, GpuKvCache, GpuModel
from expertmesh.attention_server.gpu_sampler import GpuSampler
from expertmesh.attention_server.gpu_step import SampleInputs, StepMemory
from expertmesh.attention_server.host_step import HostStep
from expertmesh.attention_server.step_places import CHUNK_OF_NOTHING, StepPlaces, places_of
from expertmesh.kernels.sampler import gumbel_argmax
from expertmesh.mesh.device_routing import DeviceRouting
from expertmesh.mesh.halves import Routes
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.padding import PaddedStep


class DeviceSamples:
    """What the micro-batches of a step leave for the host, each at places of its own."""

    def __init__(self, spec: ModelSpec, num_samples: int, device: torch.device) -> None:
        """``num_samples``: of all micro-batches, padding included."""
        self.logits_ZV = torch.empty(num_samples, spec.vocab_size, dtype=spec.dtype, device=device)
        self.token_Z = torch.zeros(num_samples, dtype=torch.int64, device=device)


class GpuMicroBatch:
    """Implements ``mesh.halves.MicroBatch`` for what was staged.

    Args:
        index: 0, or 1 for the second micro-batch of a step, whose replicas are chosen at the prices behind the first.
        first_sample: where its samples begin among those of the step.
        routing: of the view, when it is asked.
    """

    def __init__(
        self,
        index: int,
        spec: ModelSpec,
        model: GpuModel,
        cache: GpuKvCache,
        memory: StepMemory,
        samples: DeviceSamples,
        first_sample: int,
        routing: Callable[[], DeviceRouting],
    ) -> None:
        self._index = index
        self._spec = spec
        self._model = model
        self._cache = cache
        self._memory = memory
        self._left = samples
        self._routing = routing
        self.first_sample = first_sample
        self._context: GpuContext | None = None
        self._samples: SampleInputs | None = None
        self._delta_TH = self._residual_TH = self._normed_TH = torch.empty(0)
        self._shared_TH: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return len(self._staged.token_T)

    @property
    def _staged(self) -> GpuContext:
        assert self._context is not None, "a step's inputs are staged before it begins"
        return self._context

    def fits(self, step: HostStep, padded: PaddedStep) -> bool:
        """Whether the step can be padded so."""
        return self._memory.places(padded).hold(step)

    def stage(self, step: HostStep | None, sampler: GpuSampler, padded: PaddedStep | None) -> None:
        """Send what was prepared, ``padded`` or as it is; None = nothing but padding."""
        if padded is not None:
            places = self._memory.places(padded)
        else:
            assert step is not None, "only a padded step may be of nothing"
            places = places_of(step)
        self._send(step, sampler, places)

    def stage_chunk_of_nothing(self, size: int, sampler: GpuSampler) -> None:
        """As a step with chunks of prompts that is not padded."""
        self._send(None, sampler, replace(CHUNK_OF_NOTHING, tokens=size))

    def _send(self, step: HostStep | None, sampler: GpuSampler, places: StepPlaces) -> None:
        temperature_Z, seed_Z = np.empty(0, np.float32), np.empty(0, np.int64)
        if step is not None:
            temperature_Z, seed_Z = sampler.temperature(step.row_Z), sampler.seed(step.row_Z)
        context, self._samples = self._memory.upload(step, temperature_Z, seed_Z, places)
        self._context = replace(context, micro_batch=self._index)

    def begin(self) -> None:
        self._delta_TH, self._residual_TH = self._model.begin(self._staged)
        self._advance(0)

    def before_experts(self, layer: int) -> tuple[torch.Tensor, Routes]:
        return self._normed_TH, self._model.route(layer, self._normed_TH, self._staged, self._routing())

    def while_dispatched(self, layer: int) -> None:
        self._shared_TH = self._model.shared_output(layer, self._normed_TH)

    def after_experts(self, layer: int, out_TH: torch.Tensor) -> None:
        self._delta_TH = out_TH if self._shared_TH is None else out_TH + self._shared_TH
        self._advance(layer + 1)

    def _advance(self, layer: int) -> None:
        """Attention and dense MLPs from a layer up to the next MoE layer's input, or the end, where sampling is."""
        while layer < self._spec.num_layers:
            self._normed_TH = self._model.attention(layer, self._delta_TH, self._residual_TH, self._staged, self._cache)
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
        place = slice(self.first_sample, self.first_sample + num_samples)
        logits_ZV = self._left.logits_ZV[place]
        self._model.logits(self._delta_TH, self._residual_TH, samples.sampled_Z, logits_ZV)
        token_Z = gumbel_argmax(logits_ZV, samples.temperature_Z, samples.seed_Z, samples.output_Z)
        self._left.token_Z[place] = token_Z
        self._model.last_R[samples.row_Z.long()] = token_Z
