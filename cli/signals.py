"""SIGTERM and SIGINT, handed to a thread.

A handler runs between any two instructions of the main thread. One that raises can be swallowed there (in a finaliser,
Python only prints the exception), and one that takes a lock can wait for itself. This one only puts a number into a
``SimpleQueue``, which is made for that.
"""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class SignalWatch:
    """A context manager, for the main thread: within it, every signal calls ``act`` with its number, on a thread."""

    def __init__(self, act: Callable[[signal.Signals], None]) -> None:
        self._act = act
        self._arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._arrived.put(None)
        self._thread.join()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._arrived.put(number)

    def _watch(self) -> None:
        while (number := self._arrived.get()) is not None:
            self._act(signal.Signals(number))
