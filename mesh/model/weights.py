"""Where weights come from: a checkpoint's files, or random numbers for benchmarks (``model.load_format: dummy``)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from expertmesh.mesh.config import ModelConfig
from expertmesh.mesh.model.checkpoint import Checkpoint
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.families.base import NamedTensor
from expertmesh.mesh.model.mtp import mtp_tensors
from expertmesh.mesh.model.spec import ModelSpec

_STD = 0.02


class DummyCheckpoint(Checkpoint):
    """No files: normal random numbers with a standard deviation of 0.02, norms near 1, made on the device that wants
    them. The same seed gives the same model on the same device.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._seed = seed
        self._generator = torch.Generator(device)
        self._lock = threading.Lock()  # several threads read experts

    @contextlib.contextmanager
    def progress(self, what: str, num_bytes: int) -> Iterator[None]:
        """Nothing is read."""
        yield

    def log_unused(self, spec: ModelSpec) -> None:
        """There are no others."""

    def dense_bytes(self, spec: ModelSpec) -> int:
        return 0

    def expert_bytes(self, spec: ModelSpec, layer: int, expert: int) -> int:
        return 0

    def model_tensors(self, spec: ModelSpec) -> dict[str, torch.Tensor]:
        return self._draw(-1, family_by_name(spec.family).model_tensors(spec), spec.dtype)

    def layer_tensors(self, spec: ModelSpec, layer: int) -> dict[str, torch.Tensor]:
        return self._draw(layer, family_by_name(spec.family).layer_tensors(spec, layer), spec.dtype)

    def mtp_tensors(self, spec: ModelSpec) -> dict[str, torch.Tensor]:
        return self._draw(-2, mtp_tensors(spec), spec.dtype)

    def copy_expert(
        self,
        spec: ModelSpec,
        layer: int,
        expert: int,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *biases: torch.Tensor,
    ) -> None:
        with self._lock:
            self._generator.manual_seed(hash((self._seed, layer, expert)))
            for part in (gate_up, down, *biases):
                part.normal_(0, _STD, generator=self._generator)

    def stores_fp8_experts(self, spec: ModelSpec) -> bool:
        return True

    def copy_fp8_expert(
        self,
        spec: ModelSpec,
        layer: int,
        expert: int,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_scale: torch.Tensor,
        down_scale: torch.Tensor,
    ) -> None:
        with self._lock:
            self._generator.manual_seed(hash((self._seed, layer, expert)))
            for part in (gate_up, down):
                drawn = torch.empty(part.shape, device=self._device).normal_(generator=self._generator)
                part.copy_(drawn)
        for scale in (gate_up_scale, down_scale):
            scale.fill_(_STD)

    def _draw(self, layer: int, named: Mapping[str, NamedTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        drawn: dict[str, torch.Tensor] = {}
        with self._lock:
            self._generator.manual_seed(hash((self._seed, layer)))
            for part, tensor in named.items():
                drawn[part] = torch.empty(tensor.shape, dtype=dtype, device=self._device)
                if "norm" in part:
                    drawn[part].uniform_(0.9, 1.1, generator=self._generator)
                else:
                    drawn[part].normal_(0, _STD, generator=self._generator)
        return drawn


def open_checkpoint(
    config: ModelConfig, spec: ModelSpec, device: torch.device, on_read: Callable[[int], None]
) -> Checkpoint:
    """The weights that the configuration names; ``on_read`` as for ``Checkpoint``.

    Raises:
        UserError: a shard of the checkpoint is missing or truncated, or its index is wrong.
    """
    return DummyCheckpoint(device) if config.load_format == "dummy" else Checkpoint(spec.path, on_read)
