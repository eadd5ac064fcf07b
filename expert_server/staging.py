"""Memory where the experts of a migration are put together before they go live."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from expertmesh.mesh.halves import ExpertWeights, StagingFullError
from expertmesh.mesh.model.spec import ModelSpec


class Staging:
    """Hands out memory for experts: allocated when a plan comes, so that a mesh that does not migrate has none of it.

    Thread-safe. ``capacity`` bounds what is out at a time, in experts.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self._spec = spec
        self._capacity = capacity
        self._used = 0
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Experts that memory is out for."""
        return self._used

    def reserve(self, num_experts: int) -> list[ExpertWeights]:
        """The tensors of ``ModelSpec.expert_shapes`` for each expert, uninitialised.

        Raises:
            StagingFullError: nothing was reserved.
        """
        with self._lock:
            if self._used + num_experts > self._capacity:
                raise StagingFullError(
                    f"{num_experts} experts to stage, but {self._used} of the {self._capacity} places are taken"
                )
            self._used += num_experts
        # One allocation a tensor for all of them: the experts of a plan come and go together.
        spec = self._spec
        parts = [torch.empty(num_experts, *shape, dtype=spec.dtype) for shape in spec.expert_shapes]
        return list(zip(*parts, strict=True))

    def release(self, staged: Sequence[ExpertWeights]) -> None:
        """The memory goes when the last reference to it does."""
        with self._lock:
            self._used -= len(staged)
            assert self._used >= 0, "more was given back than reserved"
