"""Weights of a checkpoint folder, memory-mapped: a server reads only the tensors it needs.

Dimensions: E experts of a layer, H hidden size, I width of an expert.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.families.base import ExpertTensors, FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.model.tensors import FETCH_AGAIN, read_tensor_index


class _Shard(Protocol):
    """The part of ``safetensors.safe_open`` that is used; its own stubs are untyped."""

    def get_tensor(self, name: str, /) -> torch.Tensor: ...

    def get_slice(self, name: str, /) -> Sequence[torch.Tensor]: ...


class Checkpoint:
    """The tensors of a folder. Safe to read from several threads; shards are mapped at their first use.

    Raises:
        UserError: at construction, if a shard is missing or truncated or the index is wrong; see ``read_tensor_index``.
    """

    def __init__(self, path: Path) -> None:
        self._index = read_tensor_index(path)
        self._open_shards: dict[str, _Shard] = {}
        self._lock = threading.Lock()

    def has(self, name: str) -> bool:
        return name in self._index.entries

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in its own memory, converted to ``dtype``.

        Raises:
            UserError: it is missing, has another shape, a dtype that is not float32, bfloat16 or float16, or cannot
                be read.
        """
        out = torch.empty(shape, dtype=dtype)
        self._copy(NamedTensor(name, shape), out)
        return out

    def model_tensors(self, spec: ModelSpec) -> dict[str, torch.Tensor]:
        """Embedding, final norm and LM head by the part names of ``families.base.Family``; tied = no ``lm_head``."""
        return self._read_all(family_by_name(spec.family).model_tensors(spec), spec.dtype)

    def layer_tensors(self, spec: ModelSpec, layer: int) -> dict[str, torch.Tensor]:
        """The dense tensors of a layer by the part names of ``families.base.Family``."""
        return self._read_all(family_by_name(spec.family).layer_tensors(spec, layer), spec.dtype)

    def expert(self, spec: ModelSpec, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's ``gate_up[2I, H]`` (gate first) and ``down[H, I]`` in ``spec.dtype``; errors as ``tensor``."""
        gate_up = torch.empty(2 * spec.moe_intermediate_size, spec.hidden_size, dtype=spec.dtype)
        down = torch.empty(spec.hidden_size, spec.moe_intermediate_size, dtype=spec.dtype)
        self.copy_expert(spec, layer, expert, gate_up, down)
        return gate_up, down

    def copy_expert(self, spec: ModelSpec, layer: int, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """As ``expert``, into tensors that are there, converting to their dtype."""
        family = family_by_name(spec.family)
        fused = family.fused_expert_tensors(spec, layer)
        if self.has(fused.gate_up.name):
            self._copy_fused(fused, expert, gate_up, down)
        else:
            self._copy_own(family.expert_tensors(spec, layer, expert), gate_up, down)

    def _copy_own(self, tensors: ExpertTensors, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2)
        self._copy(tensors.gate, gate)
        self._copy(tensors.up, up)
        self._copy(tensors.down, down)

    def _copy_fused(self, tensors: FusedExpertTensors, expert: int, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self._copy(tensors.gate_up, gate_up, expert)
        self._copy(tensors.down, down, expert)

    def _read_all(self, parts: Mapping[str, NamedTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {part: self.tensor(named.name, named.shape, dtype) for part, named in parts.items()}

    def _copy(self, named: NamedTensor, out: torch.Tensor, expert: int | None = None) -> None:
        """Copy a tensor, or one expert's part of a fused one, into ``out``."""
        shard = self._index.require(named.name, named.shape).shard
        try:
            mapped = self._open(shard)
            stored = mapped.get_tensor(named.name) if expert is None else mapped.get_slice(named.name)[expert]
        except (SafetensorError, OSError) as error:
            raise UserError(str(self._index.path / shard), f"cannot be read ({error})", FETCH_AGAIN) from None
        out.copy_(stored)

    def _open(self, shard: str) -> _Shard:
        with self._lock:
            if shard not in self._open_shards:
                self._open_shards[shard] = cast(_Shard, safe_open(self._index.path / shard, framework="pt"))
            return self._open_shards[shard]
