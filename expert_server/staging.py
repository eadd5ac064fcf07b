"""Memory where the experts of a migration are put together before they go live."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from expertmesh.mesh.halves import ExpertWeights, StagingFullError
from expertmesh.mesh.model.spec import ModelSpec


class Staging:
    """Hands out memory for experts: allocated when a plan comes, so that a mesh that does not migrate has none of it,
    unless somebody has to know beforehand where it is.

    Thread-safe. ``capacity`` bounds what is out at a time, in experts.
    """

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self._spec = spec
        self._capacity = capacity
        self._used = 0
        self._lock = threading.Lock()
        self._fixed: tuple[torch.Tensor, ...] = ()
        self._free: list[int] = []
        self._row: dict[int, int] = {}  # by the address of an expert's first tensor

    @property
    def used(self) -> int:
        """Experts that memory is out for."""
        return self._used

    def memory(self) -> Sequence[torch.Tensor]:
        """What ``reserve`` hands out from now on, allocated once and for all: each tensor has ``capacity`` experts."""
        with self._lock:
            if not self._fixed:
                self._fixed = self._allocate(self._capacity)
                self._free = list(range(self._capacity))
                self._row = {self._fixed[0][row].data_ptr(): row for row in self._free}
            return self._fixed

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
            rows = [self._free.pop() for _ in range(num_experts)] if self._fixed else range(num_experts)
        # One allocation a tensor for all of them: the experts of a plan come and go together.
        parts = self._fixed or self._allocate(num_experts)
        return [tuple(part[row] for part in parts) for row in rows]

    def release(self, staged: Sequence[ExpertWeights]) -> None:
        """Memory that is not fixed goes when the last reference to it does."""
        with self._lock:
            self._used -= len(staged)
            assert self._used >= 0, "more was given back than reserved"
            addresses = [weights[0].data_ptr() for weights in staged]
            self._free += [self._row[address] for address in addresses if address in self._row]

    def _allocate(self, num_experts: int) -> tuple[torch.Tensor, ...]:
        spec = self._spec
        return tuple(torch.empty(num_experts, *shape, dtype=spec.dtype) for shape in spec.expert_shapes)
