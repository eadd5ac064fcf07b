"""An engine in process: sequences are submitted, steps made, outputs collected by handle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from expertmesh.attention_server.constraint import Matcher
from expertmesh.attention_server.half_base import HalfBase
from expertmesh.attention_server.outputs import Load, Output
from expertmesh.attention_server.request import Sampling
from expertmesh.attention_server.request import Sequence as EngineSequence
from expertmesh.attention_server.tracing import RequestTrace
from expertmesh.mesh.model.spec import ModelSpec


class EngineDriver:
    """``half`` is set by whoever derives from it, and ``step``.

    Args:
        now: of the engine's clock, in seconds.
    """

    half: HalfBase
    load: Load

    def __init__(self, spec: ModelSpec, now: list[float] | None = None) -> None:
        self.spec = spec
        self.now = now if now is not None else [100.0]
        self.outputs: dict[int, list[Output]] = {}

    def _listen(self) -> None:
        self.load = self.half.engine.load()
        self.half.engine.set_sink(self._take)

    def _take(self, outputs: list[Output], load: Load) -> None:
        self.load = load
        for output in outputs:
            self.outputs.setdefault(output.handle, []).append(output)

    def submit(
        self,
        handle: int,
        prompt: Sequence[int],
        *,
        output: Sequence[int] = (),
        priority: int = 0,
        arrival_s: float = 0.0,
        timeout_s: float = 0.0,
        link: int = 1,
        matcher: Matcher | None = None,
        trace: RequestTrace | None = None,
        **sampling: Any,
    ) -> None:
        params = Sampling(**{"max_tokens": 16, **sampling})
        given = [*prompt, *output]
        tokens = np.zeros(min(len(prompt) + params.max_tokens, self.spec.max_model_len), np.int64)
        tokens[: len(given)] = given
        self.half.engine.post(
            EngineSequence(
                link=link,
                handle=handle,
                request_id=f"r{handle}",
                tokens=tokens,
                num_prompt=len(prompt),
                num_tokens=len(given),
                sampling=params,
                matcher=matcher,
                trace=trace,
                priority=priority,
                arrival_s=arrival_s,
                timeout_s=timeout_s,
                deadline_s=self.now[0] + timeout_s if timeout_s else float("inf"),
                queued_s=self.now[0],
            )
        )

    def step(self) -> int:
        """One step; returns its tokens."""
        raise NotImplementedError

    def run(self, max_steps: int = 10_000) -> int:
        """Step until nothing is left; returns the number of steps."""
        for steps in range(max_steps):
            if not self.step():
                return steps
        raise AssertionError(f"sequences still run after {max_steps} steps")

    def tokens(self, handle: int) -> list[int]:
        return [output.token for output in self.outputs.get(handle, []) if output.token is not None]


class TimedDriver(EngineDriver):
    """Notes when tokens reach the host."""

    arrivals: dict[int, list[float]]
    landings: list[tuple[float, int]]

    def __init__(self, *args: Any, **options: Any) -> None:
        self.reset()
        super().__init__(*args, **options)

    def reset(self) -> None:
        self.outputs, self.arrivals, self.landings = {}, {}, []

    def _take(self, outputs: list[Output], load: Load) -> None:
        now = time.perf_counter()
        if outputs:
            self.landings.append((now, len(outputs)))
            for output in outputs:
                self.arrivals.setdefault(output.handle, []).append(now)
        super()._take(outputs, load)
