"""The batch of the next step, from its choice to its launch."""

from __future__ import annotations

import time

from expertmesh.attention_server.chunk import Chunk
from expertmesh.attention_server.request import Sequence


class PreparedBatch:
    """Its sequences keep their blocks while it may be launched, also those that end meanwhile."""

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self._chosen_ns = 0  # wall time
        self._dropped: list[Sequence] = []

    @property
    def is_whole(self) -> bool:
        """There is one, and none of its sequences has ended."""
        return bool(self.chunks) and not self._dropped

    def set(self, chunks: list[Chunk]) -> None:
        # Sequences with as many tokens and about as much context side by side make few attention groups.
        chunks.sort(key=_attention_order)
        for chunk in chunks:
            chunk.sequence.in_batch = True
        self.chunks, self._chosen_ns = chunks, time.time_ns()

    def drop(self, sequence: Sequence) -> None:
        """A sequence of it has ended."""
        sequence.dropped = True
        self._dropped.append(sequence)

    def clear(self) -> list[Sequence]:
        """It is launched, or another one is to be chosen; returns the sequences that have ended."""
        for chunk in self.chunks:
            chunk.sequence.in_batch = False
        ended, self.chunks, self._dropped = self._dropped, [], []
        return ended

    def link(self, traceparent: str) -> None:
        """Traced sequences of it ride in the step whose trace it is."""
        for chunk in self.chunks:
            if chunk.sequence.trace is not None:
                chunk.sequence.trace.link(traceparent, "step")

    def trace_launch(self) -> None:
        """Before what it computes is counted as computed."""
        for chunk in self.chunks:
            trace, start = chunk.sequence.trace, chunk.sequence.num_computed
            if trace is not None and chunk.is_prefill:
                trace.chunk_launched(start, start + chunk.count, self._chosen_ns)


def _attention_order(chunk: Chunk) -> tuple[int, int]:
    return (chunk.num_rows, chunk.sequence.num_computed)
