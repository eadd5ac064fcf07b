"""What of the exchanges' time on a device other kernels use: the share that two micro-batches hide."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_EXCHANGE = re.compile(r"deep_?ep|nccl|dispatch|combine", re.IGNORECASE)


@dataclass(frozen=True)
class KernelTime:
    """``start`` and ``end`` in µs of one clock."""

    name: str
    start: float
    end: float

    @property
    def is_exchange(self) -> bool:
        """Of DeepEP or NCCL; the names of the project's own kernels, from Triton, begin with an underscore."""
        return not self.name.startswith("_") and bool(_EXCHANGE.search(self.name))


def hidden(kernels: Iterable[KernelTime]) -> tuple[float, float]:
    """Time in which an exchange ran, and how much of it other kernels ran as well."""
    found = list(kernels)
    exchanges = _union([kernel for kernel in found if kernel.is_exchange])
    others = _union([kernel for kernel in found if not kernel.is_exchange])
    both, place = 0.0, 0
    for start, end in exchanges:
        while place < len(others) and others[place][1] <= start:
            place += 1
        for low, high in others[place:]:
            if low >= end:
                break
            both += min(high, end) - max(low, start)
    return sum(end - start for start, end in exchanges), both


def _union(kernels: list[KernelTime]) -> list[tuple[float, float]]:
    """Their times as intervals that do not touch, in order."""
    spans: list[tuple[float, float]] = []
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        if spans and kernel.start <= spans[-1][1]:
            spans[-1] = spans[-1][0], max(spans[-1][1], kernel.end)
        else:
            spans.append((kernel.start, kernel.end))
    return spans
