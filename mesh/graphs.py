"""CUDA graphs of steps: the device work of a padded step is captured once for each kind and replayed from then on.

A graph is the step loop's own pass through the layers, run once under capture; nothing else knows what a step does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from expertmesh.mesh.padding import PaddedStep

log = logging.getLogger(__name__)


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
        self._graphs: dict[PaddedStep, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # an opaque handle of torch's
        self.num_captures = 0
        self.replays = Counter[PaddedStep]()

    def capture_all(self, steps: Iterable[PaddedStep], passes: Callable[[PaddedStep], Callable[[], None]]) -> None:
        """Capture ``passes(step)`` for every step, in their order."""
        started = time.monotonic()
        for step in steps:
            self.capture(step, passes(step))
        log.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - started)

    def capture(self, step: PaddedStep, forward: Callable[[], None]) -> None:
        if self._is_alone:
            forward()
        graph = self._captured(forward, self._pool)
        self._pool = self._pool or graph.pool()
        self._graphs[step] = graph
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

    def has(self, step: PaddedStep) -> bool:
        return step in self._graphs

    def close(self) -> None:
        """Drop the graphs; one that runs goes when it is over."""
        self._graphs.clear()

    def replay(self, step: PaddedStep) -> None:
        """Enqueue a graph that was captured."""
        self._graphs[step].replay()
        self.replays[step] += 1


def _start_libraries(device: torch.device) -> None:
    """Products make their handles at first use, which no capture allows."""
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.zeros(16, 16, dtype=dtype, device=device)
        torch.mm(square, square)
        F.linear(square, square, square[0])
