"""Weights of a checkpoint folder: a server reads only the tensors it needs, several at a time.

Dimensions: E experts of a layer, H hidden size, I width of an expert.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from expertmesh.mesh.errors import UserError
from expertmesh.mesh.model.families import family_by_name
from expertmesh.mesh.model.families.base import ExpertTensors, FusedExpertTensors, NamedTensor
from expertmesh.mesh.model.load_progress import LoadProgress
from expertmesh.mesh.model.mtp import mtp_tensors
from expertmesh.mesh.model.quantisation.dequantise import dequantise_fp8, dequantise_ints, dequantise_mxfp4
from expertmesh.mesh.model.quantisation.storage import Fp8Blocks, Mxfp4, PackedInts, Plain, find_storage, stored_bytes
from expertmesh.mesh.model.reader import TORCH_DTYPES, TensorReader
from expertmesh.mesh.model.spec import ModelSpec
from expertmesh.mesh.model.tensors import TensorEntry, read_tensor_index
from expertmesh.mesh.model.unused import find_unused

READERS = 4
"""Threads that read weights: enough to keep a disk busy."""
_LARGE_BYTES = 64 << 20


class Checkpoint:
    """The tensors of a folder. Safe to read from several threads; shards are opened at their first use.

    Args:
        on_read: gets the number of bytes after each read of weights, on the thread that read.

    Raises:
        UserError: at construction, if a shard is missing or truncated or the index is wrong; see ``read_tensor_index``.
    """

    def __init__(self, path: Path, on_read: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._index = read_tensor_index(path)
        self._reader = TensorReader(path, self._count)
        self._on_read = on_read
        self._progress: LoadProgress | None = None

    @contextlib.contextmanager
    def progress(self, what: str, num_bytes: int) -> Iterator[None]:
        """Log how far the reads in this block are, every few seconds; one block at a time.

        Args:
            num_bytes: of all of them, as they are stored.
        """
        self._progress = LoadProgress(what, num_bytes)
        try:
            yield
        finally:
            self._progress = None

    def log_unused(self, spec: ModelSpec) -> None:
        """Warn of tensors that no part of the model uses."""
        find_unused(family_by_name(spec.family), spec, self._index).log_for(self._index)

    def dense_bytes(self, spec: ModelSpec) -> int:
        """Bytes that ``model_tensors``, ``layer_tensors`` of all layers and ``mtp_tensors`` read."""
        family = family_by_name(spec.family)
        parts = [family.model_tensors(spec), *(family.layer_tensors(spec, layer) for layer in spec.layers)]
        if spec.mtp_layer is not None:
            parts.append(mtp_tensors(spec))
        return sum(stored_bytes(self._index, named) for part in parts for named in part.values())

    def expert_bytes(self, spec: ModelSpec, layer: int, expert: int) -> int:
        """Bytes that ``copy_expert`` reads."""
        fused = self._fused(spec, layer)
        if fused is not None:
            stored = sum(stored_bytes(self._index, named) for named in fused.all)
            return stored // spec.num_experts
        own = family_by_name(spec.family).expert_tensors(spec, layer, expert)
        assert own is not None, "a family names an expert's tensors in one way at least"
        return sum(stored_bytes(self._index, named) for named in own.all)

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

    def mtp_tensors(self, spec: ModelSpec) -> dict[str, torch.Tensor]:
        """Of the layer of multi-token prediction, by the part names of ``mesh.model.mtp``."""
        return self._read_all(mtp_tensors(spec), spec.dtype)

    def expert(self, spec: ModelSpec, layer: int, expert: int) -> tuple[torch.Tensor, ...]:
        """One expert's tensors of ``spec.expert_shapes`` in ``spec.dtype``, gate first; errors as ``tensor``."""
        gate_up, down, *biases = (torch.empty(shape, dtype=spec.dtype) for shape in spec.expert_shapes)
        self.copy_expert(spec, layer, expert, gate_up, down, *biases)
        return gate_up, down, *biases

    def copy_expert(
        self,
        spec: ModelSpec,
        layer: int,
        expert: int,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        *biases: torch.Tensor,
    ) -> None:
        """As ``expert``, into tensors that are there, converting to their dtype."""
        fused = self._fused(spec, layer)
        if fused is not None:
            self._copy_fused(fused, expert, gate_up, down, *biases)
            return
        own = family_by_name(spec.family).expert_tensors(spec, layer, expert)
        assert own is not None, "a family names an expert's tensors in one way at least"
        self._copy_own(own, gate_up, down)

    def stores_fp8_experts(self, spec: ModelSpec) -> bool:
        """Whether each expert has tensors of its own, all in float8 with scales by blocks (looks at one a layer)."""
        return all(self._fp8_parts(spec, layer, 0) is not None for layer in spec.moe_layers)

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
        """As ``copy_expert``, as it is stored: float8 [2I, H] and [H, I], float32 scales [2, ⌈I/128⌉, ⌈H/128⌉] and
        [⌈H/128⌉, ⌈I/128⌉].

        Raises:
            UserError: it is stored otherwise, or cannot be read.
        """
        parts = self._fp8_parts(spec, layer, expert)
        if parts is None:
            raise UserError(
                "expert.fp8", f"is on, and expert {expert} of layer {layer} is not stored in FP8", "set expert.fp8: off"
            )
        targets = zip((*gate_up.chunk(2), down), (*gate_up_scale, down_scale), strict=True)
        for storage, (weight, scale) in zip(parts, targets, strict=True):
            self._reader.copy(storage.weight, weight)
            self._reader.copy(storage.scale, scale)

    def _fp8_parts(self, spec: ModelSpec, layer: int, expert: int) -> list[Fp8Blocks] | None:
        """Gate, up and down; None where one is stored otherwise."""
        own = family_by_name(spec.family).expert_tensors(spec, layer, expert)
        if own is None or self._fused(spec, layer) is not None:
            return None
        stored = [find_storage(self._index, named) for named in (own.gate, own.up, own.down)]
        parts = [storage for storage in stored if isinstance(storage, Fp8Blocks)]
        return parts if len(parts) == len(stored) else None

    def _fused(self, spec: ModelSpec, layer: int) -> FusedExpertTensors | None:
        """The tensors of all experts of a layer; None where each has its own."""
        family = family_by_name(spec.family)
        fused = family.fused_expert_tensors(spec, layer)
        if fused is not None and (self.has(fused.gate_up.name) or family.expert_tensors(spec, layer, 0) is None):
            return fused
        return None

    def _copy_own(self, tensors: ExpertTensors, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        gate, up = gate_up.chunk(2)
        self._copy(tensors.gate, gate)
        self._copy(tensors.up, up)
        self._copy(tensors.down, down)

    def _copy_fused(self, tensors: FusedExpertTensors, expert: int, *parts: torch.Tensor) -> None:
        for named, out in zip(tensors.all, parts, strict=True):
            interleaved = tensors.interleaved and named in (tensors.gate_up, tensors.gate_up_bias)
            if not interleaved and not (tensors.transposed and out.dim() == 2):
                self._copy(named, out, expert)
                continue
            rows = self._fused_rows(named, tensors.transposed and out.dim() == 2, expert, out.dtype)
            if interleaved:
                gate, up = out.chunk(2)
                gate.copy_(rows[::2])
                up.copy_(rows[1::2])
            else:
                out.copy_(rows)

    def _fused_rows(self, named: NamedTensor, transposed: bool, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's part of a fused tensor, its outputs first."""
        storage = find_storage(self._index, named)
        if isinstance(storage, Mxfp4):
            return self._read_mxfp4(storage, expert, named.shape[1])
        stored = torch.empty(named.shape[1:], dtype=dtype)
        self._copy(named, stored, expert)
        return stored.T if transposed else stored

    def _read_all(self, parts: Mapping[str, NamedTensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = {
            part: torch.empty(named.shape, dtype=torch.float32 if named.float32 else dtype)
            for part, named in parts.items()
        }
        copies = [copy for part, named in parts.items() for copy in self._copies(named, tensors[part])]
        with ThreadPoolExecutor(READERS, thread_name_prefix="dense-read") as pool:
            # list() raises what a read raised, and leaving the block waits for all others.
            list(pool.map(lambda copy: copy(), copies))
        return tensors

    def _copies(self, named: NamedTensor, out: torch.Tensor) -> list[Callable[[], None]]:
        """What copies a tensor: several calls where it is large, such as an embedding, so that all threads read it."""
        storage = find_storage(self._index, named)
        if not isinstance(storage, Plain) or out.nbytes <= _LARGE_BYTES or len(out) < READERS:
            return [partial(self._copy, named, out)]
        rows = -(-len(out) // READERS)
        return [
            partial(self._reader.copy_rows, storage.entry, first, out[first : first + rows])
            for first in range(0, len(out), rows)
        ]

    def _copy(self, named: NamedTensor, out: torch.Tensor, expert: int | None = None) -> None:
        """Copy a tensor, or one expert's part of a fused one, into ``out``."""
        storage = find_storage(self._index, named)
        match storage:
            case Plain():
                self._reader.copy(storage.entry, out, row=expert)
            case Fp8Blocks():
                out.copy_(dequantise_fp8(self._read(storage.weight), self._read(storage.scale)))
            case PackedInts():
                packed, scale = self._read(storage.packed), self._read(storage.scale)
                out.copy_(dequantise_ints(packed, scale, storage.num_bits, named.shape[1]))
            case Mxfp4():
                raise AssertionError("only the transposed experts of a layer are stored as MXFP4")

    def _read_mxfp4(self, storage: Mxfp4, expert: int, num_inputs: int) -> torch.Tensor:
        """float32 [outputs, inputs] of one expert."""
        blocks, scales = self._read(storage.blocks, expert), self._read(storage.scales, expert)
        return dequantise_mxfp4(blocks, scales)[:, :num_inputs]

    def _read(self, entry: TensorEntry, row: int | None = None) -> torch.Tensor:
        """A tensor, or one row along its first dimension, as it is stored."""
        stored = torch.empty(entry.shape if row is None else entry.shape[1:], dtype=TORCH_DTYPES[entry.dtype])
        self._reader.copy(entry, stored, row=row)
        return stored

    def _count(self, num_bytes: int) -> None:
        self._on_read(num_bytes)
        progress = self._progress
        if progress is not None:
            progress.add(num_bytes)
