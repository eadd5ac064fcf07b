"""The inputs of a step on a GPU: one packed message from the host a step, at places that CUDA graphs know.

Dimensions: T tokens of the step (padded where a graph runs it), S sequences, Z samples, R rows of the sequence table,
W blocks that a block table names, C pieces of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.gpu_model import GpuContext
from expertmesh.kernels.paged_prefill import prefill_pieces

_ALIGNMENT = 4
"""Words: Triton compiles a kernel once more for addresses that are no multiples of 16 bytes."""
_IN_FLIGHT = 3
"""Messages that may be under way: of the step that runs, of the next one, and one that is being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostStep:
    """A prepared batch on the host. Sequences with one token come first, as ``chunks`` do.

    ``token_T`` -1: the sequence's last token, which only the device knows. ``sampled_Z`` indexes the tokens of T whose
    logits are needed.
    """

    chunks: list[Chunk]
    token_T: np.ndarray
    row_T: np.ndarray
    position_T: np.ndarray
    place_T: np.ndarray
    length_S: np.ndarray
    table_SW: np.ndarray
    num_decodes: int
    pieces_C4: np.ndarray
    sampled_Z: np.ndarray
    row_Z: np.ndarray
    output_Z: np.ndarray
    traceparent: str

    @property
    def num_tokens(self) -> int:
        return len(self.token_T)

    @property
    def is_decode(self) -> bool:
        """One token a sequence, and each of them sampled from."""
        return len(self.sampled_Z) == self.num_tokens


def build_step(
    chunks: list[Chunk], blocks_RW: np.ndarray, block_size: int, traceparent: str, queries_a_piece: int
) -> HostStep:
    """The arrays of a batch whose chunks come with their counts ascending."""
    sequences = [chunk.sequence for chunk in chunks]
    row_S = np.array([sequence.row for sequence in sequences])
    start_S = np.array([sequence.num_computed for sequence in sequences])
    count_S = np.array([chunk.count for chunk in chunks])
    completes_S = np.array([chunk.completes for chunk in chunks])
    pending_S = np.array([sequence.num_pending for sequence in sequences])
    last_S = np.cumsum(count_S) - 1
    num_decodes = int((count_S == 1).sum())
    if num_decodes == len(chunks):
        token_T = np.array([s.tokens[start] for s, start in zip(sequences, start_S.tolist(), strict=True)])
        row_T, position_T = row_S, start_S
    else:
        spans = zip(sequences, start_S.tolist(), count_S.tolist(), strict=True)
        token_T = np.concatenate([sequence.tokens[start : start + count] for sequence, start, count in spans])
        row_T = np.repeat(row_S, count_S)
        position_T = np.arange(len(token_T)) + np.repeat(start_S - (last_S + 1 - count_S), count_S)
    token_T[last_S[(pending_S > 0) & completes_S]] = -1
    length_S = start_S + count_S
    table_SW = blocks_RW[row_S, : -(-int(length_S.max()) // block_size)]
    return HostStep(
        chunks=chunks,
        token_T=token_T,
        row_T=row_T,
        position_T=position_T,
        place_T=blocks_RW[row_T, position_T // block_size] * block_size + position_T % block_size,
        length_S=length_S,
        table_SW=table_SW,
        num_decodes=num_decodes,
        pieces_C4=_pieces(count_S[num_decodes:], start_S[num_decodes:], num_decodes, queries_a_piece),
        sampled_Z=last_S[completes_S],
        row_Z=row_S[completes_S],
        output_Z=np.array([sequence.num_output for sequence in sequences])[completes_S],
        traceparent=traceparent,
    )


def _pieces(count_S: np.ndarray, start_S: np.ndarray, num_decodes: int, queries: int) -> np.ndarray:
    """Of the sequences behind the decodes."""
    pieces_C4 = prefill_pieces(count_S, start_S, queries)
    pieces_C4[:, :2] += num_decodes
    return pieces_C4


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
        most_pieces = max_tokens // queries_a_piece + max_seqs
        most_arrays = 12
        size = 11 * max_tokens + max_seqs + 4 * most_pieces + max_seqs * table_width + most_arrays * _ALIGNMENT
        self._words = torch.zeros(size, dtype=torch.int32, device=device)
        self._table_SW = torch.zeros(max_seqs, table_width, dtype=torch.int32, device=device)
        pin = device.type == "cuda"
        self._hosts = [torch.zeros(size, dtype=torch.int32, pin_memory=pin) for _ in range(_IN_FLIGHT)]
        self._turn = 0

    def upload(
        self, step: HostStep | None, temperature_Z: np.ndarray, seed_Z: np.ndarray, size: int | None
    ) -> tuple[GpuContext, SampleInputs]:
        """Send a step, padded to ``size`` tokens with one sample each, or as it is (None).

        ``step`` None: nothing but padding. What is returned for a size is always at the same places.
        """
        host = self._hosts[self._turn]
        self._turn = (self._turn + 1) % _IN_FLIGHT
        writer = _Writer(host.numpy(), self._words)
        num_tokens = step.num_tokens if step is not None else 0
        padded = num_tokens if size is None else size
        num_samples = padded if size is not None else len(seed_Z)
        none = np.empty(0, np.int64)

        def put(values: np.ndarray, length: int, padding: int = 0) -> torch.Tensor:
            return writer.put(values, length, padding)

        count = put(np.array([num_tokens]), 1)
        seed = put(seed_Z.view(np.int32), 2 * num_samples).view(torch.int64)
        temperature = put(temperature_Z.view(np.int32), num_samples).view(torch.float32)
        row_Z = put(step.row_Z if step else none, num_samples, self._spare_row)
        output_Z = put(step.output_Z if step else none, num_samples)
        token_T = put(step.token_T if step else none, padded)
        row_T = put(step.row_T if step else none, padded, self._spare_row)
        position_T = put(step.position_T if step else none, padded)
        place_T = put(step.place_T if step else none, padded, -1)
        num_seqs = padded if size is not None else len(step.length_S) if step else 0
        length_S = put(step.length_S if step else none, num_seqs)
        sampled_Z = pieces_C4 = None
        if size is None and step is not None:
            sampled_Z = put(step.sampled_Z, num_samples)
            if len(step.pieces_C4):
                pieces_C4 = put(step.pieces_C4.ravel(), step.pieces_C4.size).view(-1, 4)
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
            num_decodes=padded if size is not None else step.num_decodes if step else 0,
            pieces_C4=pieces_C4,
            num_tokens=count,
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
