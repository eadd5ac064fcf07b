"""The sequences of an engine that have not ended, and the deadlines of those that have one."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from expertmesh.attention_server.request import Sequence


class ActiveSequences:
    """By link and handle."""

    def __init__(self) -> None:
        self._sequences: dict[tuple[int, int], Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Of those that are there now; they may be removed meanwhile."""
        return iter(list(self._sequences.values()))

    def get(self, link: int, handle: int) -> Sequence | None:
        return self._sequences.get((link, handle))

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.link, sequence.handle] = sequence
        if sequence.timeout_s > 0:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.serial, sequence))

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.link, sequence.handle]

    def take_overdue(self, now: float) -> list[Sequence]:
        """Those whose deadline has passed, each once."""
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sequence = heapq.heappop(self._deadlines)[2]
            if self.get(sequence.link, sequence.handle) is sequence:
                overdue.append(sequence)
        return overdue
