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
import torch.nn.functional as F

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


def eager_sizes_up_to(limit: int) -> tuple[int, ...]:
    """Tokens of steps without a graph that between them need every kernel that such steps may need."""
    return tuple(size for size in (2**n for n in range(5, 20)) if size <= limit)


class StepGraphs:
    """The graphs of one view on one device. Belongs to the step thread.

    All share one memory pool, largest first: what one graph leaves in it the others overwrite, so a step's results must
    be copied out before the next step, on the same stream.

    Args:
        is_alone: no other rank takes part in the passes: they are run before they are captured, so that kernels are
            compiled and libraries have allocated. With others nothing is launched: a rank that compiles in the middle
            of a pass would keep its peers waiting in a kernel until their time-out. Then the capture compiles.
    """

    def __init__(self, device: torch.device, *, is_alone: bool = True) -> None:
        self._device = device
        self._is_alone = is_alone
        if not is_alone:
            _start_libraries(device)
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}  # by size and micro-batches
        self._pool: Any = None  # an opaque handle of torch's
        self.num_captures = 0

    def capture_all(
        self, sizes: Iterable[int], passes: Callable[[int], Callable[[], None]], micro_batches: int = 1
    ) -> None:
        """Capture ``passes(size)`` for every size, in their order; a pass has so many micro-batches of the size."""
        started = time.monotonic()
        for size in sizes:
            self.capture(size, passes(size), micro_batches)
        log.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - started)

    def capture(self, size: int, forward: Callable[[], None], micro_batches: int = 1) -> None:
        if self._is_alone:
            forward()
        graph = self._captured(forward, self._pool)
        self._pool = self._pool or graph.pool()
        self._graphs[size, micro_batches] = graph
        self.num_captures += 1

    def rehearse(self, forward: Callable[[], None]) -> None:
        """Have the kernels of a pass compiled that will be run without a graph."""
        if self._is_alone:
            forward()
        else:
            self._captured(forward, None)

    def _captured(self, forward: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile: migrations are staged beside the step loop. This one may where it has
        # to compile: loading a kernel allocates.
        mode = "thread_local" if self._is_alone else "relaxed"
        with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
            forward()
        return graph

    def has(self, size: int, micro_batches: int = 1) -> bool:
        return (size, micro_batches) in self._graphs

    def close(self) -> None:
        """Drop the graphs; one that runs goes when it is over."""
        self._graphs.clear()

    def replay(self, size: int, micro_batches: int = 1) -> None:
        """Enqueue the graph of a size that was captured."""
        self._graphs[size, micro_batches].replay()


def _start_libraries(device: torch.device) -> None:
    """Products make their handles at first use, which no capture allows."""
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.zeros(16, 16, dtype=dtype, device=device)
        torch.mm(square, square)
        F.linear(square, square, square[0])
