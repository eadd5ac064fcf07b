"""How far a load of weights is, for those who wait for one that takes long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

SAY_EVERY_S = 5.0


class LoadProgress:
    """Counts bytes from several threads and says every few seconds how many there are; a short load says nothing."""

    def __init__(self, what: str, num_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._num_bytes = max(num_bytes, 1)
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._began_s = self._said_s = clock()

    def add(self, num_bytes: int) -> None:
        with self._lock:
            self._done += num_bytes
            now_s = self._clock()
            if now_s - self._said_s < SAY_EVERY_S:
                return
            self._said_s = now_s
            done = min(self._done, self._num_bytes)
        log.info(
            "loading %s: %d %% of %.2f GB, %.2f GB/s",
            self._what,
            100 * done // self._num_bytes,
            self._num_bytes / 1e9,
            done / 1e9 / (now_s - self._began_s),
        )
