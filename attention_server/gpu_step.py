"""The inputs of a step on a GPU: one packed message from the host a step, at places that CUDA graphs know.

Dimensions: T tokens of the step (padded where a graph runs it), S sequences, Z samples, W blocks that a block table
names, C pieces of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.gpu_model import GpuContext
from expertmesh.attention_server.host_step import HostStep
from expertmesh.attention_server.step_places import StepPlaces, padded_places
from expertmesh.mesh.padding import PaddedStep

_ALIGNMENT = 4
"""Words: Triton compiles a kernel once more for addresses that are no multiples of 16 bytes."""
_IN_FLIGHT = 3
"""Messages that may be under way: of the step that runs, of the next one, and one that is being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleInputs:
    """What sampling takes, on the device: Z samples, padding among them, whose row is the table's spare one."""

    sampled_Z: torch.Tensor | None
    row_Z: torch.Tensor
    output_Z: torch.Tensor
    temperature_Z: torch.Tensor
    seed_Z: torch.Tensor


class StepMemory:
    """Where inputs lie on the device, and the pinned memory that they come from."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_seqs: int,
        spare_row: int,
        table_width: int,
        queries_a_piece: int,
        device: torch.device,
    ) -> None:
        """``max_tokens``, ``max_seqs``: padding included, whose samples go to row ``spare_row``."""
        self._spare_row = spare_row
        self._max_seqs, self._queries_a_piece = max_seqs, queries_a_piece
        most_pieces = max_tokens // queries_a_piece + max_seqs
        most_arrays = 12
        size = 11 * max_tokens + max_seqs + 4 * most_pieces + max_seqs * table_width + most_arrays * _ALIGNMENT
        self._words = torch.zeros(size, dtype=torch.int32, device=device)
        self._table_SW = torch.zeros(max_seqs, table_width, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(_IN_FLIGHT)]
        self._turn = 0

    def places(self, padded: PaddedStep) -> StepPlaces:
        """What there is of a padded step."""
        return padded_places(padded, self._max_seqs, self._queries_a_piece)

    def upload(
        self, step: HostStep | None, temperature_Z: np.ndarray, seed_Z: np.ndarray, places: StepPlaces
    ) -> tuple[GpuContext, SampleInputs]:
        """Send a step, padded to ``places``; None = nothing but padding.

        What is returned for the same places is always at the same addresses.
        """
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % _IN_FLIGHT
        writer = _Writer(host.numpy(), self._words)
        put, none = writer.put, np.empty(0, np.int64)
        num_samples, num_tokens = places.samples, places.tokens
        count = put(np.array([step.num_tokens if step else 0]), 1)
        seed = put(seed_Z.view(np.int32), 2 * num_samples).view(torch.int64)
        temperature = put(temperature_Z.view(np.int32), num_samples).view(torch.float32)
        row_Z = put(step.row_Z if step else none, num_samples, self._spare_row)
        output_Z = put(step.output_Z if step else none, num_samples)
        token_T = put(step.token_T if step else none, num_tokens)
        row_T = put(step.row_T if step else none, num_tokens, self._spare_row)
        position_T = put(step.position_T if step else none, num_tokens)
        place_T = put(step.place_T if step else none, num_tokens, -1)
        length_S = put(step.length_S[: step.num_decodes] if step else none, places.decodes)
        sampled_Z = pieces_C4 = None
        if not places.samples_all:
            sampled_Z = put(step.sampled_Z if step else none, num_samples)
        if places.pieces:
            pieces_C4 = put(step.pieces_C4.ravel() if step else none, 4 * places.pieces).view(-1, 4)
        table_SW = put(step.table_SW.ravel(), step.table_SW.size).view(step.table_SW.shape) if step else None
        self._words[: writer.end].copy_(host[: writer.end], non_blocking=True)
        if table_SW is not None:
            self._table_SW[: table_SW.shape[0], : table_SW.shape[1]].copy_(table_SW)
        context = GpuContext(
            token_T=token_T,
            row_T=row_T,
            position_T=position_T,
            place_T=place_T,
            length_S=length_S,
            table_SW=self._table_SW,
            num_decodes=places.decodes,
            pieces_C4=pieces_C4,
            num_tokens=count,
            is_padded=places.is_padded,
        )
        samples = SampleInputs(
            sampled_Z=sampled_Z, row_Z=row_Z, output_Z=output_Z, temperature_Z=temperature, seed_Z=seed
        )
        return context, samples


class _Writer:
    """Lays arrays of 32-bit words one behind the other; an array's view is where it will be on the device."""

    def __init__(self, host: np.ndarray, words: torch.Tensor) -> None:
        self._host = host
        self._words = words
        self.end = 0

    def put(self, values: np.ndarray, length: int, padding: int = 0) -> torch.Tensor:
        start = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.end = start + length
        self._host[start : start + len(values)] = values
        self._host[start + len(values) : self.end] = padding
        return self._words[start : self.end]
