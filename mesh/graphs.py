"""CUDA graphs of steps: the device work of a step is captured once for each size and replayed from then on.

A graph is the step loop's own pass through the layers, run once under capture; nothing else knows what a step does.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import Any

import torch

log = logging.getLogger(__name__)

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Tokens a rank that graphs are captured for: what pads a step costs less than 15 % from 48 tokens on."""


def sizes_up_to(limit: int) -> tuple[int, ...]:
    """The graph sizes that steps of at most ``limit`` tokens need."""
    return tuple(size for size in SIZES if size < limit) + ((round_up(limit),) if limit <= SIZES[-1] else ())


def round_up(num_tokens: int) -> int:
    """The size of the graph that serves so many tokens; beyond the largest one the number itself."""
    place = bisect_left(SIZES, num_tokens)
    return SIZES[place] if place < len(SIZES) else num_tokens


class StepGraphs:
    """The graphs of one view on one device. Belongs to the step thread.

    All share one memory pool, largest first: what one graph leaves in it the others overwrite, so a step's results must
    be copied out before the next step, on the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # an opaque handle of torch's
        self.num_captures = 0

    def capture_all(self, sizes: Iterable[int], passes: Callable[[int], Callable[[], None]]) -> None:
        """Capture ``passes(size)`` for every size, in their order; each is run eagerly before."""
        started = time.monotonic()
        for size in sizes:
            self.capture(size, passes(size))
        log.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - started)

    def capture(self, size: int, forward: Callable[[], None]) -> None:
        forward()  # compiles kernels and lets libraries allocate
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: migrations are staged beside the step loop.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            forward()
        self._pool = self._pool or graph.pool()
        self._graphs[size] = graph
        self.num_captures += 1

    def has(self, size: int) -> bool:
        return size in self._graphs

    def replay(self, size: int) -> None:
        """Enqueue the graph of a size that was captured."""
        self._graphs[size].replay()
