"""The arrays of a prepared batch on the host, as a GPU will have them.

Dimensions: T tokens, S sequences, Z samples, R rows of the sequence table, W blocks that a block table names, C pieces
of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from expertmesh.attention_server.chunk import Chunk
from expertmesh.kernels.paged_prefill import prefill_pieces


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
